"""Watchdog of the driver's waits: writes them to a file for `sdft status`, and reports a stall."""

import asyncio
import io
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sdft.actors.shared.waiting import WAITS, Wait, Waits
from sdft.services.base.files import write_atomically
from sdft.services.records.waits import WAITING

EVERY_S = 2.0


class Watchdog:
    """Watches the waits of this process. `run` runs until it is cancelled."""

    def __init__(self, run_dir: Path, stall_s: float, notice: Callable[[str], None], waits: Waits = WAITS) -> None:
        """stall_s: notice(text) is called after so many seconds in which no wait has ended."""
        self._run_dir, self._stall_s = run_dir, stall_s
        self._notice, self._waits = notice, waits

    async def run(self) -> None:
        ended, moved, told = -1, time.monotonic(), False
        written: list[Wait] = []
        try:
            while True:
                now = time.monotonic()
                if self._waits.ended != ended:
                    ended, moved, told = self._waits.ended, now, False
                waits = self._waits.now
                if waits != written:
                    with suppress(OSError):  # as on a full disk: the next round tries again
                        self._write(waits)
                        written = waits
                if now - moved >= self._stall_s and not told:
                    self._notice(self._stalled(waits, now))
                    told = True
                await asyncio.sleep(min(EVERY_S, self._stall_s / 4))
        finally:
            (self._run_dir / WAITING).unlink(missing_ok=True)

    def _write(self, waits: list[Wait]) -> None:
        began = time.time() - time.monotonic()
        rows = [{"what": w.what, "since": began + w.since} for w in waits]
        write_atomically(self._run_dir / WAITING, json.dumps(rows).encode())

    def _stalled(self, waits: list[Wait], now: float) -> str:
        """Write a file with the waits and every task's stack. Return the notice, also if the file cannot be written."""
        path = self._run_dir / "logs" / time.strftime("stall-%Y%m%d-%H%M%S.txt")
        lines = [f"{now - w.since:8.1f} s (at most {w.limit_s:g} s) for {w.what}" for w in waits]
        stacks = io.StringIO()
        for task in asyncio.all_tasks():
            stacks.write(f"\n{task.get_name()}\n")
            task.print_stack(file=stacks)
        for_what = "; ".join(f"{w.what} ({now - w.since:.0f} s of at most {w.limit_s:g})" for w in waits)
        said = f"no wait has ended for {self._stall_s:g} s; waiting for {for_what or 'nothing known'}"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text("waited for:\n" + "\n".join(lines) + "\n" + stacks.getvalue())
        except OSError as error:
            return f"{said}; the stacks of the tasks could not be written: {error}"
        return f"{said}; stacks of all tasks: {path}"
