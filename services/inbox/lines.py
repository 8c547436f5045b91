"""The lines of an inbox file: records and deletions, one JSON object a line, in the order in which they came.

    {"kind": "record", "id": 3, "key": "order-17", "body": "9f3c...", "at": 1764345600.5, "row": {"prompt": ...}}
    {"kind": "deleted", "id": 3, "at": 1764345700.1}

A line counts once it ends with its newline. A last line without one was never acknowledged.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Received:
    """A record as it came."""

    id: int  # from 0, in the order of the file
    key: str | None  # Idempotency-Key of the request that it came with
    body: str  # digest of that request's body, hexadecimal
    at: float  # seconds since the epoch
    row: dict[str, Any]

    @property
    def line(self) -> bytes:
        return _line({"kind": "record"} | asdict(self))


@dataclass(frozen=True)
class Deleted:
    """A record that is not to be trained."""

    id: int
    at: float

    @property
    def line(self) -> bytes:
        return _line({"kind": "deleted"} | asdict(self))


class InboxDamaged(Exception):
    """A line of the file is neither a record nor a deletion."""


def read_lines(path: Path) -> Iterator[tuple[Received | Deleted, int]]:
    """Yield each whole line of a file, and the offset of its end. Raises InboxDamaged with the number of a bad line."""
    with path.open("rb") as file:
        yield from _read(file, path)


def _read(file: BinaryIO, path: Path) -> Iterator[tuple[Received | Deleted, int]]:
    end = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            return
        end += len(line)
        try:
            fields = json.loads(line)
            kinds: dict[str, type[Received | Deleted]] = {"record": Received, "deleted": Deleted}
            yield kinds[fields.pop("kind")](**fields), end
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InboxDamaged(f"{path}:{number} is no line of an inbox ({error}); restore the file") from None


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
