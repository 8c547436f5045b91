"""Receipts: the prompt and the answer behind each receipt, and feedback to it, until their time is over.

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

from sdft.services.releases.canary import Opinions

DAY_S = 86400
SWEEP_EVERY_S = 3600  # between two removals of old ones


@dataclass(frozen=True)
class Receipt:
    """An answer, and what it answered."""

    id: str
    at: float
    release: int
    messages: list[dict[str, Any]] | None  # None: a completion of a plain text
    tools: list[dict[str, Any]] | None
    answer: dict[str, Any]  # the assistant's message

    @property
    def demonstration(self) -> str | dict[str, Any]:
        """The answer as a demonstration: its text, or the message if it has tool calls."""
        kept = {key: self.answer.get(key) for key in ("role", "content", "tool_calls") if self.answer.get(key)}
        return kept if "tool_calls" in kept else str(kept.get("content", ""))


class Receipts:
    """The receipts in an SQLite file. Its calls run in one thread."""

    def __init__(self, path: Path, days: float) -> None:
        self._thread = ThreadPoolExecutor(1, "receipts")
        self._days, self._swept = days, 0.0
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # survives the process
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS receipts (id TEXT PRIMARY KEY, at REAL NOT NULL, body TEXT NOT NULL)"
        )
        self._db.execute("CREATE INDEX IF NOT EXISTS receipts_at ON receipts (at)")
        columns = "receipt TEXT, key TEXT UNIQUE, at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL"
        self._db.execute(f"CREATE TABLE IF NOT EXISTS feedback ({columns})")
        self._db.execute("CREATE INDEX IF NOT EXISTS feedback_of ON feedback (receipt)")
        self._db.commit()
        self._sweep()

    async def keep(self, receipt: Receipt) -> None:
        """Write a receipt. Raises sqlite3.Error if the disk does not take it."""
        await self._call(self._keep, receipt)

    async def find(self, receipt: str) -> Receipt | None:
        """Return the receipt with this id; None if there is none, or its time is over."""
        row = await self._call(self._find, receipt)
        return None if row is None else Receipt(receipt, row[0], **json.loads(row[1]))

    async def note(self, receipt: str, kind: str, said: Any, key: str | None) -> None:
        """Write feedback to an answer, once for each key."""
        await self._call(self._note, receipt, kind, said, key)

    async def opinions(self, release: int, since: float, good_score: float | None) -> Opinions:
        """Return the feedback to a release's answers since then, one opinion for each answer: the last one.

        A score is good from `good_score` on (None: above 0). A correction is bad. Others do not count.
        """
        return await self._call(self._opinions, release, since, good_score)

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
        if time.monotonic() - self._swept > SWEEP_EVERY_S:
            self._sweep()

    def _sweep(self) -> None:
        """Remove what is too old."""
        oldest = time.time() - self._days * DAY_S
        with self._db:
            self._db.execute("DELETE FROM receipts WHERE at < ?", (oldest,))
            self._db.execute("DELETE FROM feedback WHERE at < ?", (oldest,))
        self._swept = time.monotonic()

    def _find(self, receipt: str) -> tuple[float, str] | None:
        oldest = time.time() - self._days * DAY_S
        row: tuple[float, str] | None = self._db.execute(
            "SELECT at, body FROM receipts WHERE id = ? AND at >= ?", (receipt, oldest)
        ).fetchone()
        return row

    def _note(self, receipt: str, kind: str, said: Any, key: str | None) -> None:
        with self._db:
            row = (receipt, key, time.time(), kind, json.dumps(said))
            self._db.execute("INSERT OR IGNORE INTO feedback VALUES (?, ?, ?, ?, ?)", row)

    def _opinions(self, release: int, since: float, good_score: float | None) -> Opinions:
        query = (
            "SELECT f.receipt, f.kind, f.body FROM feedback f JOIN receipts r ON r.id = f.receipt "
            "WHERE r.at >= ? AND json_extract(r.body, '$.release') = ? AND f.kind IN ('score', 'correction') "
            "ORDER BY f.rowid"
        )
        last = {receipt: (kind, json.loads(said)) for receipt, kind, said in self._db.execute(query, (since, release))}
        good = sum(
            kind == "score" and (said >= good_score if good_score is not None else said > 0)
            for kind, said in last.values()
        )
        return Opinions(good, len(last) - good)

    def _counts(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT kind, COUNT(*) FROM feedback GROUP BY kind"))
