"""A log: a .jsonl file to which other processes append whole lines while the run goes on."""

import os
from collections.abc import Iterator
from pathlib import Path

from sdft.services.base.errors import UserError
from sdft.services.data.rows import BOM, NumberedRow, parse_line
from sdft.services.data.sources.growing import GrowingSource, RecordMaker


class LogSource(GrowingSource):
    """The lines of a .jsonl file. A line counts once it has its newline; blank lines are skipped."""

    def __init__(self, name: str, maker: RecordMaker) -> None:
        super().__init__(name, maker)
        self._line, self._offset = 0, 0  # whole lines read, and their bytes

    def rows(self, after: int) -> Iterator[NumberedRow]:
        with Path(self.name).open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                raise UserError(
                    f"{self.name}: the log has become shorter than line {self._line}, which was read already; restore "
                    f"its lines, and run the same command again: it resumes from the last checkpoint"
                )
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # half-written: its writer has not finished
                self._line += 1
                self._offset += len(line)
                text = line.removeprefix(BOM) if self._line == 1 else line
                if text.strip():
                    yield self._line, parse_line(text)
