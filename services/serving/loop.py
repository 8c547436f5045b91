"""The loop of a service: when a window begins, what becomes of it, and which release is served.

    wait for records ─► open a window ─► train ─► candidate ─► gate ─┬─► promote: all engines change
           ▲                                                        ├─► hold: wait for a person
           └────────────────────────────────────────────────────────┴─► refuse: records quarantined

Each decision is in the journal before it takes effect, and every step begins from the journal: a service that was
killed anywhere goes on where it was.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from sdft.services.config.run import RunConfig
from sdft.services.inbox.inbox import Inbox
from sdft.services.records.rows import Reply, read_rows
from sdft.services.records.run_dir import is_held
from sdft.services.releases.events import Ended, Held, Judged, Pinned, Refused, Released, Served, Split
from sdft.services.releases.gate import Decision, compare, decide
from sdft.services.releases.journal import Journal
from sdft.services.releases.state import Release, Window
from sdft.services.serving.engines import NotChanged, ServingPool, Weights
from sdft.services.serving.folder import ServiceFolder
from sdft.services.serving.keeping import prune
from sdft.services.serving.training import TrainingFailed, forget_states, make_candidate, train_window
from sdft.services.serving.window import draw, waiting, write_window

POLL_S = 1.0
TRIES, AGAIN_S = 3, 30.0  # of a window whose run fails by no fault of its records


class NotPossible(Exception):
    """What a person asked for cannot be done in this state. The message says why."""


class Loop:
    """Runs windows, and does what operators ask for. All methods must run in one event loop."""

    def __init__(
        self,
        folder: ServiceFolder,
        config: RunConfig,
        journal: Journal,
        inbox: Inbox,
        pool: ServingPool,
        notice: Callable[[str], None],
    ) -> None:
        """config: of the service, with absolute paths. The journal must have a served release."""
        assert config.service is not None
        self._folder, self._config, self._settings = folder, config, config.service
        self._journal, self._inbox, self._pool = journal, inbox, pool
        self._notice = notice
        self._changed = asyncio.Event()
        self._deciding = asyncio.Lock()  # one decision about what is served at a time
        self._training: asyncio.Task[None] | None = None
        self.doing = "starting"  # for people
        self.pid: int | None = None  # of the process that trains or exports

    def notify(self) -> None:
        """Say that there are new records or decisions."""
        self._changed.set()

    def weights(self, number: int) -> Weights:
        """Return a release as engines load it."""
        release = self._journal.state.releases[number]
        version = f"window {release.window}, step {release.step}" if release.window is not None else "as started"
        return Weights(number, self._folder.path / release.folder, release.files, version)

    async def run(self) -> None:
        """Run until cancelled."""
        tries = 0
        while True:
            state = self._journal.state
            undecided, window = state.undecided, state.open_window
            if undecided is not None and undecided.status == "candidate":
                await self._decide(undecided)
            elif undecided is not None:
                self.doing = f"waits for a person: release {undecided.number} is held ({undecided.reason})"
                await self._change(POLL_S)
            elif window is not None:
                tries = await self._train(window, tries)
            else:
                await self._wait_for_records()

    async def _wait_for_records(self) -> None:
        window, state = self._settings.window, self._journal.state
        ids = waiting(state, self._inbox.records, self._inbox.deleted)
        oldest = time.time() - self._inbox.records[ids[0]].at if ids else 0.0
        if len(ids) >= window.min_records or (ids and state.parts) or (ids and oldest >= window.max_wait_s):
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
        with suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._changed.wait()
        self._changed.clear()

    async def _train(self, window: Window, tries: int) -> int:
        """Train the open window, as a task that a rollback can cancel. Returns the failed tries so far."""
        self.doing = f"trains window {window.number}"
        self._training = asyncio.create_task(self._run_window(window), name=f"window {window.number}")
        try:
            await self._training
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # the service stops
                self._training.cancel()
                await asyncio.wait([self._training])
                raise
        except TrainingFailed as error:
            tries += 1
            if error.bad or tries >= TRIES:
                self._journal.write(Ended(window.number, False, str(error), time.time()))
                self._notice(f"window {window.number} has failed, and its records are quarantined: {error}")
                return 0
            self._notice(f"window {window.number}: {error}; it is tried again in {AGAIN_S:g} s")
            self.doing = f"waits to try window {window.number} again: {error}"
            await asyncio.sleep(AGAIN_S)
            return tries
        finally:
            self._training, self.pid = None, None
        return 0

    async def _run_window(self, window: Window) -> None:
        folder, state = self._folder, self._journal.state
        while is_held(folder.run(window.number)):  # a run of a service that was killed has not ended yet
            await asyncio.sleep(POLL_S)
        model = folder.path / state.releases[window.parent].folder
        path = write_window(folder, window, self._config, state, self._inbox.records, model)
        await train_window(folder, window.number, path, self._began)
        self.doing = f"exports window {window.number}"
        number, rows = max(state.releases) + 1, len(window.train) + len(window.replayed)
        candidate = await make_candidate(folder, window.number, number, rows, window.train, self._began)
        self._journal.write(candidate)
        self._notice(f"candidate: release {number}, after {candidate.step} steps of window {window.number}")

    def _began(self, pid: int) -> None:
        self.pid = pid

    async def _decide(self, release: Release) -> None:
        """Judge a candidate, and do what the gate says."""
        self.doing = f"compares release {release.number} with release {self._journal.state.served}"
        if not release.verdict:
            decision = await asyncio.to_thread(self._compare, release)
            rows = [r.row for r in decision.sets]
            self._journal.write(Judged(release.number, decision.verdict, decision.reason, rows, time.time()))
            self._notice(f"gate: {decision.verdict} release {release.number}: {decision.reason}")
        if release.verdict == "promote":
            try:
                await self.promote(release.number, "gate")
            except NotChanged as error:
                self._journal.write(Held(release.number, "gate", str(error), time.time()))
                self._notice(f"release {release.number} is held: {error}")
        elif release.verdict == "hold":
            self._journal.write(Held(release.number, "gate", release.reason, time.time()))
        else:
            self._journal.write(Refused(release.number, "gate", release.reason, time.time()))
            window = self._journal.state.windows[release.window or 0]
            self._quarantine(window)
            self._forget(release)

    def _quarantine(self, window: Window) -> None:
        """Leave the records of a refused window in quarantine, or try them again in halves if they are few."""
        deleted, parts = self._inbox.deleted, []
        ids = [i for i in sorted([*window.train, *window.held_out]) if i not in deleted]
        if 2 <= len(ids) <= self._settings.gate.split_up_to:
            parts = [ids[: len(ids) // 2], ids[len(ids) // 2 :]]
            self._journal.write(Split(window.number, parts, time.time()))
            self._notice(f"{len(ids)} records of window {window.number} are tried again in halves")
        else:
            self._notice(f"{len(ids)} records of window {window.number} are quarantined")

    def _compare(self, release: Release) -> Decision:
        assert release.window is not None
        replies = read_rows(self._folder.run(release.window), Reply)
        last = max((r.step for r in replies), default=0)
        before, now = ([r for r in replies if r.step == step] for step in (0, last))
        return decide(compare(before, now, self._settings.gate.max_drop), self._settings.gate)

    async def promote(self, number: int, by: str) -> None:
        """Serve a release. Raises NotPossible or NotChanged."""
        async with self._deciding:
            await self._serve(number, by, [])

    async def _serve(self, number: int, by: str, withdrawn: list[int]) -> None:
        state = self._journal.state
        release = self._found(number)
        if not (self._folder.path / release.folder).is_dir():
            raise NotPossible(f"the weights of release {number} are not kept any more")
        if state.served == number:
            raise NotPossible(f"release {number} is served already")
        gap = await self._pool.change(self.weights(number))
        window = state.open_window
        self._journal.write(Served(number, by, withdrawn, time.time()))
        if window is not None:  # it began from another release
            self._journal.write(Ended(window.number, True, f"release {number} is served instead", time.time()))
            if self._training is not None:
                self._training.cancel()
        self._notice(f"release {number} is served (by {by}, gap {gap:.1e})")
        self._forget(release)
        prune(self._folder, state, self._settings.keep_releases)
        self.notify()

    async def roll_back(self, number: int, by: str) -> int:
        """Take back the served release, refuse a held one, or go back to an earlier one. Returns what is served.

        Raises NotPossible or NotChanged.
        """
        async with self._deciding:
            state, release = self._journal.state, self._found(number)
            assert state.served is not None
            if release.status in ("held", "candidate"):
                self._journal.write(Refused(number, by, f"refused by {by}", time.time()))
                self._notice(f"release {number} is refused (by {by})")
                self._forget(release)
                self.notify()
                return state.served
            line = state.lineage(state.served)
            if number == state.served:
                if len(line) < 2:
                    raise NotPossible(f"release {number} is the first one; there is none before it")
                target = line[1]
            elif number in line:
                target = number
            else:
                raise NotPossible(
                    f"release {number} is {release.status}, and the served release {state.served} does not come from "
                    f"it; promote it instead"
                )
            await self._serve(target, by, line[: line.index(target)])
            return target

    async def hold(self, number: int, by: str) -> None:
        """Have a candidate wait for a person. Raises NotPossible."""
        async with self._deciding:
            if self._found(number).status not in ("candidate", "held"):
                raise NotPossible(f"release {number} is {self._found(number).status}; only a candidate can be held")
            self._journal.write(Held(number, by, f"held by {by}", time.time()))
            self.notify()

    def pin(self, number: int, pinned: bool) -> None:
        """Keep the weights of a release, or do not any more. Raises NotPossible."""
        self._found(number)
        self._journal.write(Pinned(number, pinned, time.time()))

    def let_out(self, window: int) -> list[int]:
        """Let the quarantined records of a window wait again. Returns them. Raises NotPossible."""
        state = self._journal.state
        if window not in state.windows:
            raise NotPossible(f"there is no window {window}")
        of = state.windows[window]
        deleted = self._inbox.deleted
        ids = [
            i
            for i in (*of.train, *of.held_out)
            if (r := state.record(i, i in deleted)).state == "quarantined" and r.window == window
        ]
        if not ids:
            raise NotPossible(f"no record of window {window} is in quarantine")
        self._journal.write(Released(ids, time.time()))
        self.notify()
        return ids

    def _found(self, number: int) -> Release:
        release = self._journal.state.releases.get(number)
        if release is None:
            raise NotPossible(f"there is no release {number}")
        return release

    def _forget(self, release: Release) -> None:
        if release.window is not None:
            forget_states(self._folder, release.window)
