"""Records that are added while a run goes on: each new row is checked and tokenized as the rows of a file are.

    rows of the source ─► RecordMaker: columns, checks, prompts ─┬─► records and prompts, in order
                                                                 └─► a bad row: skipped, noted and counted

A bad row does not end the run: other processes write the rows, and hours of training would be lost. A row that is
exactly {"closed": true} closes the source; what follows it is not read.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from sdft.services.base.errors import UserError, first_line
from sdft.services.data.demonstrations import Record, RowChecker
from sdft.services.data.pairs import PromptPair
from sdft.services.data.rows import BadRow, NumberedRow, renamed
from sdft.services.data.sources.base import PromptSource

CLOSING = {"closed": True}


class RecordMaker:
    """Makes the records of a row and their prompts, with the checks of a file's rows."""

    def __init__(self, checker: RowChecker, columns: Mapping[Any, str], build: Callable[[Record], PromptPair]) -> None:
        """columns: {our name: name in the row}. build() raises UserError for a record that is too long."""
        self._checker, self._columns, self._build = checker, columns, build

    def records(self, number: int, row: dict[str, Any] | BadRow) -> list[Record]:
        """Return the records of a row. UserError says what is wrong with the row."""
        ((_, renamed_row),) = renamed([(number, row)], self._columns)
        records = self._checker.check(number, renamed_row)
        if isinstance(records, BadRow):
            raise UserError(f"{self._checker.name}:{number}: {records}")
        return records

    def prompts(self, number: int, record: Record) -> PromptPair:
        """Return the prompts of a record, which is then used. UserError if they are too long."""
        pair = self._build(record)
        self._checker.accept(record, number)
        return pair


class GrowingSource(PromptSource):
    """Base class of sources to which records are added. A subclass implements `rows`.

    A class of a user's own is named in data.source as `package.module:Name`. It gets data.train as `name`.
    """

    grows: ClassVar[bool] = True

    def __init__(self, name: str, maker: RecordMaker) -> None:
        self.name = name
        self.records: list[Record] = []
        self.prompts: list[PromptPair] = []
        self.skipped: list[str] = []  # the bad rows, as "name:number: what is wrong"
        self._maker = maker
        self._taken, self._closed = 0, False  # number of the last row that was taken
        self.unreadable = ""  # why the last look failed; empty: it did not

    def rows(self, after: int) -> Iterable[NumberedRow]:
        """Yield the rows behind the row numbered `after` that exist now, with their numbers, which ascend from 1.

        The rows are taken one by one, and the iteration may be ended behind any of them. An OSError is taken for a
        fault that passes.
        """
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def trouble(self) -> str:
        skipped = f"rows skipped: {len(self.skipped)}, the last one {self.skipped[-1]}" if self.skipped else ""
        return "; ".join(text for text in (self.unreadable, skipped) if text)

    def read(self, count: int) -> None:
        if self._closed or self.known >= count:
            return
        try:
            for number, row in self.rows(self._taken):
                self._taken = number
                if row == CLOSING:
                    self._closed = True
                    break
                self._take(number, row)
                if self.known >= count:
                    break
            self.unreadable = ""
        except OSError as error:
            self.unreadable = f"{self.name} cannot be read ({first_line(error)})"

    def _take(self, number: int, row: dict[str, Any] | BadRow) -> None:
        try:
            records = self._maker.records(number, row)
        except UserError as error:
            self._skip(error)
            return
        for record in records:
            try:
                pair = self._maker.prompts(number, record)
            except UserError as error:
                self._skip(error)
                continue
            self.records.append(record)
            self.prompts.append(pair)

    def _skip(self, error: UserError) -> None:
        self.skipped.append("; ".join(str(error).splitlines()))
