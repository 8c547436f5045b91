"""Supervision of one engine: an engine that is dead, hung or wrong is replaced, and its work repeated.

    up ── an actor's death (every call fails) ──────────────┐
     │ ── no answer for health_timeout_s: killed ───────────┼─► replaced: start, load and verify newest weights ─► up
     │ ── log-probs that are not the learner's: killed ─────┘    (too often: every call raises, the run ends)

A batch's share is enqueued whole in the engine or its replacement, with the samples' own seeds, so the result has the
same bits. In a streamed pool lost work goes to any engine that is up (`attempt`).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayError

from sdft.actors.gone import DIED, NO_MEMORY, how_it_ended
from sdft.actors.remote import Remote
from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import Process, Snapshot, SnapshotDamaged, UpdateReport, WeightMismatch
from sdft.actors.shared.waiting import cancelled, silent_for, within
from sdft.actors.transport.protocol import Destination, WeightTransport
from sdft.services.base.errors import RunFailed
from sdft.services.base.failures import Losses
from sdft.services.fleet.versions import Versions

HEALTH_EVERY_S = 10  # longest pause between two health checks
STOP_S = 8  # limit of an engine's shutdown; it takes about 1 s. No answer comes if Ray's control service has ended


@dataclass(frozen=True)
class Patience:
    """Time limits of an engine, and how often it is replaced."""

    start_s: float
    health_s: float  # time without an answer after which it counts as hung
    max_restarts: int  # within an hour


class EngineLost(Exception):
    """The engine was lost with its work, and is being replaced unless it was abandoned."""


class SupervisedEngine:
    """An engine of a pool: one name, and one process after another when engines are lost."""

    def __init__(
        self,
        name: str,
        create: Callable[[], Remote],
        patience: Patience,
        versions: Versions,
        transport: WeightTransport,
        notice: Callable[[str], None],
        changed: Callable[["SupervisedEngine"], None],
    ) -> None:
        """name: such as "teacher engine 0". create(): starts a process. versions: the weights to serve.

        notice(text): the engine is lost, back, or failed to start. changed(engine): it is up, lost, or given up.
        """
        self.name = name
        self.process = Process(0, "")
        self.placed = False  # Ray has placed its process
        self.failure: Exception | None = None  # why it is not replaced any more
        self._losses = Losses()
        self._create, self._patience = create, patience
        self._versions, self._transport = versions, transport
        self._notice, self._changed = notice, changed
        self._actor = create()
        self._started = self._abandoned = False
        self._replacing: asyncio.Task[None] | None = None
        self._proven = False  # has loaded and verified a snapshot
        self._watching: asyncio.Task[None] | None = None

    @property
    def destination(self) -> Destination:
        """Its current process, for a transport."""
        return Destination(self.name, self.process, self._actor.call)

    @property
    def up(self) -> bool:
        """Whether it serves the newest weights."""
        return self._started and self._replacing is None

    async def start(self) -> None:
        """Load the model (mostly the time of imports), and the newest weights if there are any."""
        await self._start()
        await self._load()
        self._started = True
        self._changed(self)

    async def call(self, what: str, timeout_s: float, method: str, *arguments: Any) -> Any:
        """Return the result of an engine's method; a replacement repeats the call if the engine is lost.

        RunFailed if engines were lost too often, TimeoutError if one takes longer than timeout_s, EngineLost if the
        engine was lost after `abandon`.
        """
        while True:
            while self._replacing is not None:
                await asyncio.shield(self._replacing)
                if self.failure is not None:
                    raise self.failure
            try:
                return await within(self.attempt(method, *arguments), timeout_s, f"{self.name} {what}")
            except EngineLost:
                if self._abandoned:  # no replacement will come
                    raise

    async def attempt(self, method: str, *arguments: Any) -> Any:
        """Return the result of the current engine's method. EngineLost if the engine is lost meanwhile."""
        actor = self._actor
        try:
            return await actor.call(method, *arguments)
        except RayActorError as error:
            self._replace(actor, how_it_ended(error))
            raise EngineLost(self.name) from error

    async def update_weights(self, snapshot: Snapshot) -> UpdateReport | None:
        """Load a snapshot, while `versions` offers it.

        Returns None if the engine is being replaced; the replacement loads the version.

        Raises SnapshotDamaged; FileNotFoundError if the version is gone, as with the learner; WeightMismatch if this is
        the engine's first version.
        """
        if not self.up:
            return None
        actor = self._actor
        try:
            report = await self._deliver(snapshot)
        except RayActorError as error:
            self._replace(actor, how_it_ended(error))
        except TimeoutError as error:
            self._replace(actor, f"hangs ({error})")
        except FileNotFoundError as error:
            what = f"{snapshot.role} weights v{snapshot.version}"
            raise FileNotFoundError(f"{self.name} does not find {what}: {reason(error)}") from error
        except WeightMismatch as error:
            if not self._proven:
                raise WeightMismatch(reason(error)) from error
            self._replace(actor, f"failed verification ({reason(error)})")
        else:
            self._proven = True
            return report
        return None

    async def stop(self) -> None:
        """Shut the engine down, with STOP_S to answer, then kill its actor."""
        self.abandon()
        if self._started:
            stopping = asyncio.ensure_future(self._actor.call("stop"))
            try:
                await asyncio.wait([stopping], timeout=STOP_S)
            finally:
                answered = stopping.done()
                await cancelled([stopping])  # ignores its error, as from a dead engine
                self._actor.kill(hangs=not answered)
        else:
            self._actor.kill()

    def abandon(self) -> None:
        """Stop supervising: later failures do not trigger a replacement."""
        self._abandoned = True
        for task in (self._watching, self._replacing):
            if task is not None:
                task.cancel()

    async def _start(self) -> None:
        actor, limit = self._actor, self._patience.start_s
        self.placed = False
        self.process = await within(actor.placed(), limit, f"{self.name} to be placed by Ray")
        self.placed = True
        await within(actor.call("start"), limit, f"{self.name} to load its model")
        self._watching = asyncio.create_task(self._watch(actor))

    async def _deliver(self, snapshot: Snapshot) -> UpdateReport:
        return await self._transport.deliver(snapshot, self.destination, self._versions.timeout_s)

    async def _watch(self, actor: Remote) -> None:
        """Replace the engine if it dies or hangs. Silence while weights load is no hang: loading has its own limit."""
        patience = self._patience.health_s
        while actor is self._actor:
            await asyncio.sleep(min(HEALTH_EVERY_S, patience / 4))
            try:
                silent = await silent_for(actor.call("ping"), patience)
            except RayActorError as error:
                self._replace(actor, how_it_ended(error))
                return
            if silent and not self._versions.in_use:
                self._replace(actor, f"hangs: no answer for {patience:g} s")

    def _replace(self, lost: Remote, how: str) -> None:
        if lost is not self._actor or self._replacing is not None or self._abandoned:
            return  # already found by another call, or not supervised
        if not self._started:
            return  # `start` raises, and its caller decides
        self._notice(f"{self.name} (process {self.process.pid}) {how}; it is replaced")
        self._replacing = asyncio.create_task(self._successor(how))
        self._changed(self)

    async def _successor(self, how: str) -> None:
        while True:
            self._actor.kill(hangs=how not in (DIED, NO_MEMORY))
            times = self._losses.count()
            if times > self._patience.max_restarts:
                self.failure = RunFailed(
                    f"{self.name} was lost {times} times within an hour (actors.*.max_restarts: "
                    f"{self._patience.max_restarts}); the last time it {how}"
                )
                self._changed(self)
                return
            await asyncio.sleep(self._losses.back_off_s)
            self._actor, self._proven = self._create(), False
            try:
                await self._start()
                await self._load()
            except (RayError, TimeoutError, SnapshotDamaged, WeightMismatch) as error:
                how = f"could not be replaced ({reason(error)})"
                self._notice(f"{self.name} {how}; the replacement is retried")
                continue
            self._replacing = None
            self._losses.recovered()
            self._notice(f"{self.name} is back (process {self.process.pid})")
            self._changed(self)
            return

    async def _load(self) -> None:
        """Load the newest version. If it was lost with the learner, wait for the next learner's."""
        while True:
            async with self._versions.loading() as snapshot:
                if snapshot is None:
                    return
                try:
                    await self._deliver(snapshot)
                except FileNotFoundError:
                    self._versions.mark_lost()
                else:
                    self._proven = True
                    return
