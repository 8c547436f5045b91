"""What is served, and who decides it: the gate, or a person. One decision at a time.

A decision is in the journal before its files are touched, and only after the engines have changed where they must.
"""

import asyncio
import shutil
import time
from collections.abc import Callable

from sdft.services.base.digests import differing
from sdft.services.config.service import ServiceConfig
from sdft.services.inbox.inbox import Inbox
from sdft.services.releases.canary import Opinions, decide_canary
from sdft.services.releases.events import Canary, Ended, Held, Judged, Pinned, Refused, Released, Served
from sdft.services.releases.gate import Decision
from sdft.services.releases.journal import Journal
from sdft.services.releases.state import UNDECIDED, Release, ServiceState
from sdft.services.serving.changing import Changing
from sdft.services.serving.engine import NotChanged, Weights
from sdft.services.serving.folder import ServiceFolder
from sdft.services.serving.keeping import unneeded
from sdft.services.serving.pool import ServingPool


class NotPossible(Exception):
    """What was asked for cannot be done in this state. The message says why."""


def weights_of(folder: ServiceFolder, state: ServiceState, number: int) -> Weights:
    """Return a release as engines load it."""
    release = state.releases[number]
    version = "as started" if release.window is None else f"window {release.window}, step {release.step}"
    return Weights(number, folder.path / release.folder, release.files, version)


class Decisions:
    """Makes decisions. All methods must run in one event loop."""

    def __init__(
        self,
        folder: ServiceFolder,
        settings: ServiceConfig,
        journal: Journal,
        inbox: Inbox,
        pool: ServingPool,
        changing: Changing,
        notice: Callable[[str], None],
    ) -> None:
        """The journal must have a served release."""
        self.changed = asyncio.Event()  # there is a new decision or a new record
        self._folder, self._settings = folder, settings
        self._journal, self._inbox, self._pool, self._changing = journal, inbox, pool, changing
        self._notice = notice
        self._deciding = asyncio.Lock()

    async def settle(self, release: Release, judge: Callable[[], Decision]) -> None:
        """Decide about a candidate. judge() compares it, if that has not been done; it runs in a thread.

        A candidate about which a person decides meanwhile is left to that person.
        """
        if not release.verdict:
            decision = await asyncio.to_thread(judge)
            async with self._deciding:
                if release.status != "candidate":
                    return
                rows = [r.row for r in decision.sets]
                self._journal.write(Judged(release.number, decision.verdict, decision.reason, rows, time.time()))
            self._notice(f"gate: {decision.verdict} release {release.number}: {decision.reason}")
        async with self._deciding:
            if release.status != "candidate":
                return
            canary = self._settings.gate.canary is not None
            await self._carry_out(release, release.verdict, release.reason, first_as_canary=canary)

    async def watch_canary(self, release: Release, served: Opinions, of_canary: Opinions) -> None:
        """Decide about a canary from the feedback so far, if it suffices; see that an engine has it otherwise."""
        gate = self._settings.gate
        async with self._deciding:
            if release.status != "canary":
                return
            if gate.canary is None or release.canary_at is None:
                await self._carry_out(release, "hold", "gate.canary was taken out of the configuration")
                return
            decision = decide_canary(gate, gate.canary, served, of_canary, time.time() - release.canary_at)
            if decision is not None:
                await self._carry_out(release, *decision)
            elif self._pool.canary != release.number and self._pool.newest_of_two is not None:  # after a restart
                try:
                    await self._changing.begin_canary(await self._whole(release.number))
                except (NotChanged, NotPossible) as error:
                    await self._carry_out(release, "hold", str(error))

    async def _carry_out(self, release: Release, verdict: str, reason: str, first_as_canary: bool = False) -> None:
        """Do with a candidate what the gate or the feedback says."""
        try:
            if verdict == "promote" and first_as_canary:
                if self._pool.newest_of_two is None:
                    return  # it is tried again once another engine is up
                gap = await self._changing.begin_canary(await self._whole(release.number))
                try:
                    self._journal.write(Canary(release.number, time.time()))
                except OSError:
                    await self._changing.end_canary()
                    raise
                self._notice(f"release {release.number} answers a share of the users (gap {gap:.1e})")
                return
            if verdict == "promote":
                await self._serve(release.number, "gate")
                return
        except (NotChanged, NotPossible) as error:
            verdict, reason = "hold", str(error)
        if verdict == "hold":
            await self._hold(release, "gate", reason)
        else:
            await self._refuse(release, "gate", reason)

    async def promote(self, number: int, by: str) -> None:
        """Serve a release. Raises NotPossible or NotChanged."""
        async with self._deciding:
            await self._serve(number, by)

    async def roll_back(self, number: int, by: str) -> int:
        """Take back the served release, refuse one that is not decided, or go back to one that it was trained from.

        Returns what is served then. Raises NotPossible or NotChanged.
        """
        async with self._deciding:
            state, release = self._journal.state, self._found(number)
            assert state.served is not None
            if release.status in UNDECIDED:
                await self._refuse(release, by, f"refused by {by}")
                return state.served
            line = state.lineage
            if number not in line:
                raise NotPossible(
                    f"release {number} is {release.status}, and the served release {state.served} does not come from "
                    f"it; promote it instead"
                )
            if number == line[-1] == state.served:
                raise NotPossible(f"release {number} is the first one; there is none before it")
            target = line[1] if number == state.served else number
            await self._serve(target, by)
            return target

    async def hold(self, number: int, by: str) -> None:
        """Have a candidate wait for a person. Raises NotPossible."""
        async with self._deciding:
            release = self._found(number)
            if release.status not in UNDECIDED:
                raise NotPossible(f"release {number} is {release.status}; only a candidate can be held")
            await self._hold(release, by, f"held by {by}")

    def pin(self, number: int, pinned: bool) -> None:
        """Keep the weights of a release, or do not any more. Raises NotPossible."""
        self._found(number)
        self._journal.write(Pinned(number, pinned, time.time()))

    def let_out(self, window: int) -> list[int]:
        """Let the quarantined records of a window wait again. Returns them. Raises NotPossible."""
        state, deleted = self._journal.state, self._inbox.deleted
        if window not in state.windows:
            raise NotPossible(f"there is no window {window}")
        of = state.windows[window]
        ids = []
        for record in (*of.train, *of.held_out):
            now = state.record(record, record in deleted)
            if now.state == "quarantined" and now.window == window:
                ids.append(record)
        if not ids:
            raise NotPossible(f"no record of window {window} is in quarantine")
        self._journal.write(Released(ids, time.time()))
        self.changed.set()
        return ids

    async def forget(self, record: int) -> None:
        """Take a deleted record out of the open window, which ends: its other records wait for the next one."""
        async with self._deciding:
            window = self._journal.state.open_window
            if window is not None and record in (*window.train, *window.held_out, *window.replayed):
                self._journal.write(Ended(window.number, True, "one of its records was deleted", time.time()))
                self._notice(f"window {window.number} ends, because one of its records was deleted")
                self.changed.set()

    async def _serve(self, number: int, by: str) -> None:
        state = self._journal.state
        self._found(number)
        if state.served == number:
            raise NotPossible(f"release {number} is served already")
        gap = await self._changing.change(await self._whole(number))
        self._journal.write(Served(number, by, time.time()))
        self._notice(f"release {number} is served (by {by}, gap {gap:.1e})")
        await self.tidy()

    async def _whole(self, number: int) -> Weights:
        """Return a release for the engines. Raises NotPossible if its files are not whole."""
        weights = weights_of(self._folder, self._journal.state, number)
        if not weights.folder.is_dir():
            raise NotPossible(f"the weights of release {number} are not kept any more")
        damaged = await asyncio.to_thread(differing, weights.folder, weights.files)
        if damaged is not None:
            raise NotPossible(f"release {number} is not whole: {damaged}")
        return weights

    async def _hold(self, release: Release, by: str, reason: str) -> None:
        await self._changing.end_canary()
        self._journal.write(Held(release.number, by, reason, time.time()))
        self._notice(f"release {release.number} is held: {reason}")
        self.changed.set()

    async def _refuse(self, release: Release, by: str, reason: str) -> None:
        """Refuse a candidate. Its records stay in quarantine, or are tried again in halves if they are few."""
        await self._changing.end_canary()
        window = self._journal.state.windows[release.window or 0]
        ids = sorted({*window.train, *window.held_out} - self._inbox.deleted - window.dropped.keys())
        half, parts = len(ids) // 2, list[list[int]]()
        if by == "gate" and 2 <= len(ids) <= self._settings.gate.split_up_to:
            parts = [ids[:half], ids[half:]]
        self._journal.write(Refused(release.number, by, reason, parts, time.time()))
        fate = "tried again in halves" if parts else "quarantined"
        self._notice(f"release {release.number} is refused (by {by}); {len(ids)} records are {fate}")
        await self.tidy()

    async def tidy(self) -> None:
        """Remove what no decision needs any more."""
        for folder in unneeded(self._folder, self._journal.state, self._settings.keep_releases):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        self.changed.set()

    def _found(self, number: int) -> Release:
        release = self._journal.state.releases.get(number)
        if release is None:
            raise NotPossible(f"there is no release {number}")
        return release
