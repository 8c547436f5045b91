"""The inbox of a service: records are acknowledged once they are on the disk, and each counts once.

    add(rows, key) ─┐
    add(rows, key) ─┼─► one write and one fsync for all that wait ─► acknowledged
    delete(id) ─────┘

One process writes at a time. A write that fails leaves the file as it was before, and fails the calls that it was for.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.services.base.appended import AppendedFile
from sdft.services.base.errors import UserError
from sdft.services.inbox.lines import Deleted, Received, bytes_of, read_lines, records_line

Made = list[Received] | Deleted


class InboxInUse(UserError):
    """Another process writes to the inbox."""


class KeyUsed(Exception):
    """An Idempotency-Key came a second time, with another body."""


class NotWritten(Exception):
    """The disk did not take what a call was for. Nothing of it is in the inbox."""


@dataclass(frozen=True)
class _Call:
    """A call that waits for the disk."""

    make: Callable[[int], tuple[bytes, Made]]  # its line, and what it stands for, if its first record has this id
    done: "asyncio.Future[Made]"


class Inbox:
    """The records in a file, and the only writer of it. All methods must run in one event loop."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises InboxInUse or InboxDamaged."""
        self.path = path
        self.records: list[Received] = []  # by id
        self.deleted: set[int] = set()
        self._keys: dict[str, tuple[str, asyncio.Future[Made] | list[int]]] = {}  # body, and ids if on the disk
        self._calls: list[_Call] = []
        self._writing: asyncio.Task[None] | None = None
        try:
            self._file = AppendedFile(path)
        except BlockingIOError:
            raise InboxInUse(f"{path} is in use by another service; stop it first") from None
        whole = 0
        try:
            for made, end in read_lines(path):
                self._note(made)
                whole = end
            self._file.cut(whole)  # a last line without its end was never acknowledged
        except BaseException:
            self._file.close()
            raise

    async def add(self, rows: Sequence[Mapping[str, Any]], body: bytes, key: str | None = None) -> list[int]:
        """Add the records of one request. Returns their ids once they are on the disk.

        body: of the request. A key that came before, with the same body, adds nothing and returns the ids of then.
        Raises KeyUsed or NotWritten, and Unwritable for rows that JSON cannot hold.
        """
        digest = hashlib.sha256(body).hexdigest()
        if key is not None and (before := self._keys.get(key)) is not None:
            if before[0] != digest:
                raise KeyUsed(f"the Idempotency-Key {key} came before with another body; use another key")
            known = before[1]
            return known if isinstance(known, list) else _ids(await asyncio.shield(known))
        content, at = bytes_of(rows), time.time()

        def make(first: int) -> tuple[bytes, Made]:
            records = [Received(first + i, key, digest, at, dict(row)) for i, row in enumerate(rows)]
            return records_line(first, key, digest, at, content), records

        done = self._call(make)
        if key is not None:
            self._keys[key] = digest, done
        try:
            return _ids(await asyncio.shield(done))
        except NotWritten:
            if key is not None:
                self._keys.pop(key, None)
            raise

    async def delete(self, record: int) -> None:
        """Mark a record as not to be trained, once that is on the disk. Raises KeyError or NotWritten."""
        if not 0 <= record < len(self.records):
            raise KeyError(record)
        if record not in self.deleted:
            deleted = Deleted(record, time.time())
            await asyncio.shield(self._call(lambda _: (deleted.line, deleted)))

    async def close(self) -> None:
        """Wait for what is being written, and let another process write."""
        if self._writing is not None:
            await self._writing
        self._file.close()

    def _call(self, make: Callable[[int], tuple[bytes, Made]]) -> "asyncio.Future[Made]":
        done: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda call: call.exception())  # a caller that was cancelled does not look
        self._calls.append(_Call(make, done))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all(), name="the inbox writes")
        return done

    async def _write_all(self) -> None:
        """Write what waits, all of it at once, until nothing waits."""
        while self._calls:
            calls, self._calls = self._calls, []
            lines: list[bytes] = []
            made: list[Made] = []
            first = len(self.records)
            for call in calls:
                line, of_call = call.make(first)
                first += len(of_call) if isinstance(of_call, list) else 0
                lines.append(line)
                made.append(of_call)
            try:
                await asyncio.to_thread(self._file.append, b"".join(lines))
            except OSError as error:
                for call in calls:
                    call.done.set_exception(NotWritten(f"{self.path} cannot be written ({error.strerror})"))
                continue
            for call, of_call in zip(calls, made, strict=True):
                self._note(of_call)
                call.done.set_result(of_call)

    def _note(self, made: Made) -> None:
        if isinstance(made, Deleted):
            self.deleted.add(made.id)
            return
        self.records += made
        if made and made[0].key is not None:
            self._keys[made[0].key] = made[0].body, _ids(made)


def _ids(made: Made) -> list[int]:
    assert isinstance(made, list)
    return [record.id for record in made]
