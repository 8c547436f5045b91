"""The loop of a service: when a window begins, and what becomes of it.

    wait for records ─► open a window ─► train ─► candidate ─► gate ─┬─► promote: all engines change
           ▲                                                        ├─► canary: wait for feedback
           │                                                        ├─► hold: wait for a person
           └────────────────────────────────────────────────────────┴─► refuse: records quarantined

Each decision is in the journal before it takes effect, and every turn begins from the journal: a service that was
killed anywhere goes on where it was.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from sdft.actors.shared.reason import reason
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.inbox.inbox import Inbox
from sdft.services.records.rows import Reply, read_rows
from sdft.services.records.run_dir import is_held
from sdft.services.releases.canary import Opinions
from sdft.services.releases.events import Ended
from sdft.services.releases.gate import Decision, judged
from sdft.services.releases.journal import Journal
from sdft.services.releases.state import Release, Window
from sdft.services.serving.decisions import Decisions
from sdft.services.serving.folder import ServiceFolder
from sdft.services.serving.receipts import Receipts
from sdft.services.serving.record_index import RecordIndex
from sdft.services.serving.training import TrainingFailed, make_candidate, train_window
from sdft.services.serving.window import ConfigurationChanged, draw, kept_sets, write_window

POLL_S = 1.0
CANARY_POLL_S = 2.0  # between two looks at the feedback
AGAIN_S, LONGEST_S = 30.0, 600.0  # pause before a failed turn is tried again; it doubles up to the second


class Loop:
    """Runs windows. All methods must run in one event loop."""

    def __init__(
        self,
        folder: ServiceFolder,
        config: RunConfig,
        journal: Journal,
        inbox: Inbox,
        records: RecordIndex,
        receipts: Receipts | None,
        decisions: Decisions,
        sdft: Sequence[str],
        environment: Mapping[str, str],
        notice: Callable[[str], None],
    ) -> None:
        """config: of the service, with absolute paths. sdft: the command line of `sdft`. environment: of its runs."""
        assert config.service is not None
        self._folder, self._config, self._settings = folder, config, config.service
        self._journal, self._inbox, self._records, self._receipts = journal, inbox, records, receipts
        self._decisions, self._sdft, self._environment = decisions, sdft, environment
        self._notice = notice
        self._failures = 0  # turns that failed, one after the other
        self.doing = "starting"  # for people
        self.pid: int | None = None  # of the process that trains or exports

    async def run(self) -> None:
        """Run until cancelled. After a failure the service answers on, and the loop tries again."""
        while True:
            try:
                await self._turn()
                self._failures = 0
            except (OSError, sqlite3.Error, UserError, TrainingFailed) as error:
                pause_s = min(LONGEST_S, AGAIN_S * 2**self._failures)
                self._failures += 1
                self.doing = f"waits {pause_s:g} s to try again: {reason(error)}"
                self._notice(f"{reason(error)}; it is tried again in {pause_s:g} s")
                await self._change(pause_s)

    async def _turn(self) -> None:
        state = self._journal.state
        undecided, window = state.undecided, state.open_window
        if undecided is not None and undecided.status == "candidate":
            self.doing = f"compares release {undecided.number} with release {state.served}"
            await self._decisions.settle(undecided, lambda: self._compare(undecided))
            if undecided.status == "candidate":
                self.doing = f"waits for a second engine, so that release {undecided.number} can be a canary"
                await self._change(POLL_S)
        elif undecided is not None and undecided.status == "canary":
            await self._watch_canary(undecided)
        elif undecided is not None:
            self.doing = f"waits for a person: release {undecided.number} is held ({undecided.reason})"
            await self._change(POLL_S)
        elif window is not None:
            await self._train(window)
        else:
            await self._wait_for_records()

    async def _watch_canary(self, release: Release) -> None:
        served, since = self._journal.state.served, release.canary_at or 0.0
        assert served is not None
        good = self._settings.feedback.good_score
        of_served = of_canary = Opinions()
        if self._receipts is not None:  # else the canary is held, because the configuration has none
            of_served, of_canary = [await self._receipts.opinions(n, since, good) for n in (served, release.number)]
        self.doing = (
            f"tries release {release.number} on a share of the users: {of_canary}; release {served}: {of_served}"
        )
        await self._decisions.watch_canary(release, of_served, of_canary)
        await asyncio.sleep(CANARY_POLL_S)

    async def _wait_for_records(self) -> None:
        window, state = self._settings.window, self._journal.state
        ids = self._records.waiting()
        oldest = time.time() - self._inbox.records[ids[0]].at if ids else 0.0
        part = any(set(part).intersection(ids) for part in state.parts)
        if len(ids) >= window.min_records or part or (ids and oldest >= window.max_wait_s):
            opened = draw(window, state, self._inbox.records, self._inbox.deleted, self._config.seed)
            self._journal.write(opened)
            self._notice(
                f"window {opened.window} begins: {len(opened.train)} new records, {len(opened.replayed)} of earlier "
                f"windows, {len(opened.held_out)} held out"
            )
            return
        self.doing = f"waits for records: {len(ids)} of {window.min_records}"
        await self._change(POLL_S if ids else 3600.0)

    async def _change(self, most_s: float) -> None:
        """Wait for a new record or a new decision, `most_s` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._decisions.changed.wait()
        self._decisions.changed.clear()

    async def _train(self, window: Window) -> None:
        """Train the open window, unless a decision ends it meanwhile. Raises TrainingFailed."""
        self.doing = f"trains window {window.number}"
        training = asyncio.create_task(self._run_window(window), name=f"window {window.number}")
        try:
            while not training.done() and window.open:
                changed = asyncio.create_task(self._decisions.changed.wait())
                try:
                    await asyncio.wait([training, changed], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                self._decisions.changed.clear()
        finally:
            training.cancel()
            await asyncio.wait([training])
            self.pid = None
        if training.cancelled():
            self._notice(f"window {window.number} ends: {window.ended}")
            await self._decisions.tidy()
            return
        try:
            training.result()
        except ConfigurationChanged as error:
            self._journal.write(Ended(window.number, True, str(error), time.time()))
            self._notice(f"window {window.number} ends: {error}; its records wait for the next one")
            await self._decisions.tidy()
        except TrainingFailed as error:
            if not error.bad:
                raise TrainingFailed(f"window {window.number}: {error}", bad=False) from error
            self._journal.write(Ended(window.number, False, str(error), time.time()))
            self._notice(f"window {window.number} has failed, and its records are quarantined: {error}")
            await self._decisions.tidy()

    async def _run_window(self, window: Window) -> None:
        folder, state = self._folder, self._journal.state
        while is_held(folder.run(window.number)):  # a run of a service that was killed has not ended yet
            await asyncio.sleep(POLL_S)
        model = folder.path / state.releases[window.parent].folder
        path = write_window(folder, window, self._config, state, self._inbox, model)
        await train_window(self._sdft, folder, window.number, path, self._environment, self._began)
        self.doing = f"exports window {window.number}"
        number = max(state.releases) + 1
        candidate = await make_candidate(self._sdft, folder, window, number, self._began)
        if window.open:
            self._journal.write(candidate)
            self._notice(f"candidate: release {number}, after {candidate.step} steps of window {window.number}")

    def _began(self, pid: int) -> None:
        self.pid = pid

    def _compare(self, release: Release) -> Decision:
        assert release.window is not None
        try:
            replies = read_rows(self._folder.run(release.window), Reply)
            return judged(replies, self._settings.gate, kept_sets(self._config))
        except (ValueError, UserError) as error:  # the files of the run were changed
            return Decision("hold", f"the replies of the window's run cannot be compared: {error}", [])
