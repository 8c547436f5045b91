"""What a run's ledger says, read only: another process may be writing it."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any


def ledger_rows(run_dir: Path, query: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a query on the samples; none if there is no ledger yet. Raises sqlite3.Error."""
    path = run_dir / "ledger.sqlite"
    if not path.exists():
        return
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)) as ledger:
        if ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'samples'").fetchone():
            yield from ledger.execute(query)


def trained_steps(run_dir: Path) -> dict[int, list[int]]:
    """Return the steps that trained each record of a run of one stage, by the record's index in the data."""
    steps: dict[int, list[int]] = {}
    query = "SELECT DISTINCT idx, step FROM samples WHERE state = 'trained' ORDER BY idx, step"
    for index, step in ledger_rows(run_dir, query):
        steps.setdefault(index, []).append(step)
    return steps


def dropped_records(run_dir: Path, count: int) -> dict[int, str]:
    """Return the first `count` records of which no sample was trained, by index, with the reason of the last drop."""
    trained = trained_steps(run_dir)
    reasons: dict[int, str] = {}
    query = "SELECT idx, reason FROM samples WHERE state = 'dropped' ORDER BY idx, step"
    for index, reason in ledger_rows(run_dir, query):
        reasons[index] = reason or "dropped"
    return {i: reasons.get(i, "the run ended before it") for i in range(count) if i not in trained}
