"""The lines of an inbox file, one JSON object each: the records of a request, or a deletion, in the order they came.

    {"kind": "records", "first": 3, "key": "order-17", "body": "9f3c...", "at": 1764345600.5, "rows": [{"prompt": ...}]}
    {"kind": "deleted", "id": 3, "at": 1764345700.1}

A line counts once it ends with its newline, so a request is there whole or not at all. A last line without its newline
was never acknowledged.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sdft.services.base.errors import UserError


class Unwritable(Exception):
    """Rows that JSON cannot hold: a number that is not finite, a lone surrogate, too deep a nesting."""


@dataclass(frozen=True)
class Received:
    """A record as it came."""

    id: int  # from 0, in the order of the file
    key: str | None  # Idempotency-Key of the request that it came with
    body: str  # digest of that request's body, hexadecimal
    at: float  # seconds since the epoch
    row: dict[str, Any]


@dataclass(frozen=True)
class Deleted:
    """A record that is not to be trained."""

    id: int
    at: float

    @property
    def line(self) -> bytes:
        return json.dumps({"kind": "deleted"} | asdict(self)).encode() + b"\n"


class InboxDamaged(UserError):
    """A line of the file is neither records nor a deletion."""


def bytes_of(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON. Raises Unwritable."""
    try:
        return json.dumps(rows, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError, TypeError) as error:  # UnicodeEncodeError is a ValueError
        raise Unwritable(f"a row cannot be kept as JSON ({error})") from None


def records_line(first: int, key: str | None, body: str, at: float, rows: bytes) -> bytes:
    """Return the line of a request whose first record has the id `first`. rows: from bytes_of."""
    head = json.dumps({"kind": "records", "first": first, "key": key, "body": body, "at": at})
    return head[:-1].encode() + b', "rows": ' + rows + b"}\n"


def read_lines(path: Path) -> Iterator[tuple[list[Received] | Deleted, int]]:
    """Yield each whole line of a file, and the offset of its end. Raises InboxDamaged with the number of a bad line."""
    with path.open("rb") as file:
        yield from _read(file, path)


def _read(file: BinaryIO, path: Path) -> Iterator[tuple[list[Received] | Deleted, int]]:
    end, known = 0, 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            return
        end += len(line)
        try:
            made = _line(json.loads(line), known)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InboxDamaged(f"{path}:{number} is no line of an inbox ({error}); restore the file") from None
        known += len(made) if isinstance(made, list) else 0
        yield made, end


def _line(fields: dict[str, Any], known: int) -> list[Received] | Deleted:
    """known: number of records in the lines before."""
    kind = fields.pop("kind")
    if kind == "deleted":
        return Deleted(**fields)
    if kind != "records":
        raise ValueError(f"unknown kind {kind}")
    first, rows = fields.pop("first"), fields.pop("rows")
    if first != known:
        raise ValueError(f"its first record is {first}, after {known} records")
    return [Received(id=first + i, row=dict(row), **fields) for i, row in enumerate(rows)]
