"""A source of a user's own: the rows of an SQLite table, to which other processes add while a run goes on."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from sdft.services.data.rows import BadRow, NumberedRow
from sdft.services.data.sources.growing import GrowingSource


class TableLog(GrowingSource):
    """The rows of the table `records (number INTEGER PRIMARY KEY, row TEXT)`, in the order of their numbers."""

    def rows(self, after: int) -> Iterator[NumberedRow]:
        query = "SELECT number, row FROM records WHERE number > ? ORDER BY number"
        try:
            with closing(sqlite3.connect(f"file:{self.name}?mode=ro", uri=True)) as table:
                for number, row in table.execute(query, (after,)):
                    yield number, _parsed(row)
        except sqlite3.OperationalError as error:
            raise OSError(str(error)) from error  # a fault that passes, such as a lock: the run looks again


def _parsed(text: str) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(text)
    except ValueError as error:
        return BadRow(f"no JSON: {error}")
    return row if isinstance(row, dict) else BadRow("no object")


def add(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to the table, which is made first if it is not there."""
    with closing(sqlite3.connect(path)) as table, table:
        table.execute("CREATE TABLE IF NOT EXISTS records (number INTEGER PRIMARY KEY, row TEXT NOT NULL)")
        table.executemany("INSERT INTO records (row) VALUES (?)", [(json.dumps(row),) for row in rows])
