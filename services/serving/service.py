"""A running service: its parts, and what the HTTP interface reads from them."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft.services.config.service import HttpConfig, ServiceConfig
from sdft.services.inbox.inbox import Inbox
from sdft.services.records.rows import StepMetrics, read_rows
from sdft.services.releases.journal import Journal
from sdft.services.releases.state import RecordState
from sdft.services.serving.decisions import Decisions
from sdft.services.serving.folder import ServiceFolder
from sdft.services.serving.loop import Loop
from sdft.services.serving.pool import ServingPool
from sdft.services.serving.receipts import Receipts
from sdft.services.serving.record_index import RecordIndex
from sdft.services.serving.taking import RecordChecks, Taken
from sdft.services.serving.tokens import Tokens

CHECKED_AT_ONCE = 200  # rows between two turns of the event loop
SHOWN_NOTICES = 20


class Notices:
    """What happened, for the console, and the last of it for the page."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.last: deque[tuple[float, str]] = deque(maxlen=SHOWN_NOTICES)

    def __call__(self, text: str) -> None:
        self.last.append((time.time(), text))
        self._say(text)


@dataclass
class Service:
    """The parts of a running service."""

    folder: ServiceFolder
    config: ServiceConfig
    journal: Journal
    inbox: Inbox
    receipts: Receipts | None
    checks: RecordChecks
    trained_feedback: frozenset[str]  # kinds beside corrections and good scores that become records
    tokens: Tokens | None
    pool: ServingPool
    records: RecordIndex
    decisions: Decisions
    loop: Loop
    notice: Notices
    started: float = field(default_factory=time.time)

    @property
    def http(self) -> HttpConfig:
        return self.config.http

    async def check(self, rows: Sequence[Any], name: str, small: bool) -> Taken:
        """Check rows, a few hundred at a time, so that other requests go on. small: they take a millisecond or so."""
        if small:
            return self.checks.check(rows, name)
        whole = Taken()
        for first in range(0, len(rows), CHECKED_AT_ONCE):
            part = await asyncio.to_thread(self.checks.check, rows[first : first + CHECKED_AT_ONCE], name)
            whole.rows += part.rows
            whole.problems += [problem | {"row": problem["row"] + first} for problem in part.problems]
        return whole

    def record_state(self, number: int) -> RecordState:
        return self.journal.state.record(number, number in self.inbox.deleted)

    def release_row(self, number: int) -> dict[str, Any]:
        """Return a release as the interface shows it."""
        release = self.journal.state.releases[number]
        window = None if release.window is None else self.journal.state.windows[release.window]
        return {
            "id": number,
            "status": release.status,
            "window": release.window,
            "parent": release.parent,
            "made": release.made,
            "served_at": release.served_at,
            "steps": release.step,
            "records": 0 if window is None else len(window.train),
            "verdict": release.verdict or None,
            "reason": release.reason or None,
            "sets": release.sets,
            "pinned": release.pinned,
            "kept": (self.folder.path / release.folder).is_dir(),
            "folder": str((self.folder.path / release.folder).resolve()),
        }

    async def status(self) -> dict[str, Any]:
        """Return what the service does now."""
        state, counts = self.journal.state, self.records.counts()
        window = state.open_window
        return {
            "model": self.config.name,
            "served": state.served,
            "ready": self.pool.ready,
            "doing": self.loop.doing,
            "received": len(self.inbox.records),
            "counts": counts,
            "window": None if window is None else await asyncio.to_thread(self._window_row, window.number),
            "engines": [
                {
                    "name": e.name,
                    "release": None if e.weights is None else e.weights.release,
                    "in_flight": e.in_flight,
                    "draining": e.draining,
                    "starts": e.starts,
                    "pid": e.pid,
                    "place": e.place,
                }
                for e in self.pool.engines
            ],
            "waiting_requests": self.pool.waiting,
            "training_pid": self.loop.pid,
            "feedback": {} if self.receipts is None else await self.receipts.counts(),
            "started": self.started,
            "notices": [{"at": at, "text": text} for at, text in self.notice.last],
        }

    def _window_row(self, number: int) -> dict[str, Any]:
        window, run = self.journal.state.windows[number], self.folder.run(number)
        steps = read_rows(run, StepMetrics)
        return {
            "id": number,
            "records": len(window.train),
            "replayed": len(window.replayed),
            "held_out": len(window.held_out),
            "opened": window.opened,
            "step": steps[-1].step if steps else 0,
            "steps": total_steps(run),
            "loss": [round(m.loss, 5) for m in steps],
            "run": str(run),
        }


def total_steps(run: Path) -> int | None:
    """Return the number of steps of a run; None before it has begun."""
    path = run / "run.json"
    total: int | None = json.loads(path.read_text()).get("total_steps") if path.exists() else None
    return total
