"""Receipts: the prompt and the answer behind each receipt, until their time is over.

A receipt is the `id` of an answer, as OpenAI's protocol has it. The receipt is written before the end of the answer is
sent, so feedback that follows the answer finds it.
"""

import asyncio
import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DAY_S = 86400
SWEEP_EVERY = 500  # receipts between two removals of old ones


@dataclass(frozen=True)
class Receipt:
    """An answer, and what it answered."""

    id: str
    at: float
    release: int
    messages: list[dict[str, Any]] | None  # None: a completion of a plain text
    tools: list[dict[str, Any]] | None
    answer: dict[str, Any]  # the assistant's message


class Receipts:
    """The receipts in an SQLite file. Its calls run in one thread."""

    def __init__(self, path: Path, days: float) -> None:
        self._thread = ThreadPoolExecutor(1, "receipts")
        self._days, self._since_sweep = days, 0
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # survives the process
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS receipts (id TEXT PRIMARY KEY, at REAL NOT NULL, body TEXT NOT NULL)"
        )
        self._db.execute("CREATE INDEX IF NOT EXISTS receipts_at ON receipts (at)")
        self._db.execute("CREATE TABLE IF NOT EXISTS feedback (id TEXT, at REAL NOT NULL, body TEXT NOT NULL)")
        self._db.commit()

    async def keep(self, receipt: Receipt) -> None:
        """Write a receipt. Raises sqlite3.Error if the disk does not take it."""
        await self._call(self._keep, receipt)

    async def find(self, receipt: str) -> Receipt | None:
        """Return the receipt with this id; None if there is none, or its time is over."""
        row = await self._call(self._find, receipt)
        return None if row is None else Receipt(receipt, row[0], **json.loads(row[1]))

    async def note(self, receipt: str, feedback: dict[str, Any]) -> None:
        """Write feedback to an answer."""
        await self._call(self._note, receipt, feedback)

    async def counts(self) -> dict[str, int]:
        """Return the number of pieces of feedback by what they are."""
        return await self._call(self._counts)

    async def close(self) -> None:
        await self._call(self._db.close)
        self._thread.shutdown()

    async def _call(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _keep(self, receipt: Receipt) -> None:
        fields = {name: value for name, value in vars(receipt).items() if name not in ("id", "at")}
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO receipts VALUES (?, ?, ?)", (receipt.id, receipt.at, json.dumps(fields))
            )
            self._since_sweep += 1
            if self._since_sweep >= SWEEP_EVERY:
                self._since_sweep = 0
                self._db.execute("DELETE FROM receipts WHERE at < ?", (time.time() - self._days * DAY_S,))

    def _find(self, receipt: str) -> tuple[float, str] | None:
        oldest = time.time() - self._days * DAY_S
        row: tuple[float, str] | None = self._db.execute(
            "SELECT at, body FROM receipts WHERE id = ? AND at >= ?", (receipt, oldest)
        ).fetchone()
        return row

    def _note(self, receipt: str, feedback: dict[str, Any]) -> None:
        with self._db:
            self._db.execute("INSERT INTO feedback VALUES (?, ?, ?)", (receipt, time.time(), json.dumps(feedback)))

    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for (body,) in self._db.execute("SELECT body FROM feedback"):
            for kind in json.loads(body):
                counts[kind] = counts.get(kind, 0) + 1
        return counts
