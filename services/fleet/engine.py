"""One engine's place in a pool. An engine that is dead, hung or wrong is replaced, and its work done once more.

    up ── an actor's death (every call fails) ──────────────┐
     │ ── no answer for health_timeout_s: killed ───────────┼─► replaced: start, load the newest weights, verified ─► up
     │ ── log-probs that are not the learner's: killed ─────┘    (too often: every call raises, the run ends)

A batch's share is enqueued whole in whatever engine does it, with the samples' own seeds, so the result is the same to
the last bit. In a pool that streams what was lost goes to any engine that is up (`attempt`).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayError

from sdft.actors.shared.types import BroadcastFailed, Process, SnapshotDamaged, UpdateReport, WeightMismatch
from sdft.actors.shared.waiting import cancelled, silent_for, within
from sdft.services.base.errors import RunFailed
from sdft.services.base.failures import Losses, reason
from sdft.services.fleet.remote import Remote
from sdft.services.fleet.snapshots import Published

HEALTH_EVERY_S = 10  # at most
DIED = "died"


@dataclass(frozen=True)
class Patience:
    """How long an engine may take, and how often it is replaced."""

    start_s: float
    health_s: float  # without an answer before it counts as hung
    max_restarts: int  # in an hour


@dataclass
class Group:
    """Who receives weights by broadcast (broadcast.py), beside the learner that sends them."""

    sender: object
    members: tuple[Process, ...]
    broken: str = ""  # why it did not reach all of them


class EngineLost(Exception):
    """It was lost with the work it was asked to do, and is being replaced."""


class SupervisedEngine:
    """The engine that holds a place in a pool, whoever that is at the time."""

    def __init__(
        self,
        name: str,
        create: Callable[[], Remote],
        patience: Patience,
        published: Published,
        notice: Callable[[str], None],
        changed: Callable[["SupervisedEngine"], None],
    ) -> None:
        """name: "teacher engine 0". create: starts a process in this place. published: the weights to serve.

        notice: is told what happens to it, for people. changed: is told when it is up, lost, or given up.
        """
        self.name = name
        self.process = Process(0, "")
        self.placed = False  # Ray had room for its process
        self.failure: Exception | None = None  # why it was given up
        self._losses = Losses()
        self._create, self._patience = create, patience
        self._published, self._notice, self._changed = published, notice, changed
        self._actor = create()
        self._started = self._abandoned = False
        self._replacing: asyncio.Task[None] | None = None
        self._proven = False  # has loaded a snapshot and agreed with the learner
        self._watching: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """It serves the newest weights."""
        return self._started and self._replacing is None

    async def start(self) -> None:
        """Load the model, which is mostly imports, and the newest weights if there are any."""
        await self._start()
        await self._load()
        self._started = True
        self._changed(self)

    async def call(self, what: str, timeout_s: float, method: str, *arguments: Any) -> Any:
        """The result of an engine's method, by a successor if it is lost on the way. RuntimeError if too many were."""
        while True:
            while self._replacing is not None:
                await asyncio.shield(self._replacing)
                if self.failure is not None:
                    raise self.failure
            try:
                return await within(self.attempt(method, *arguments), timeout_s, f"{self.name} {what}")
            except EngineLost:
                if self._abandoned:  # nobody will take its place
                    raise

    async def attempt(self, method: str, *arguments: Any) -> Any:
        """The result of an engine's method, by who is there now. EngineLost if it is lost on the way."""
        actor = self._actor
        try:
            return await actor.call(method, *arguments)
        except RayActorError as error:
            self._replace(actor, DIED)
            raise EngineLost(self.name) from error

    async def update_weights(self, group: Group | None = None) -> UpdateReport | None:
        """Load what was published; the caller holds its lock. None: it is being replaced, its successor will load it.

        group: by which it is being broadcast.

        Raises SnapshotDamaged, and WeightMismatch if it was the engine's first.
        """
        if not self.up:
            return None
        actor = self._actor
        try:
            report = await self._receive_weights(actor, group)
        except RayActorError:
            self._replace(actor, DIED)
        except TimeoutError as error:
            self._replace(actor, f"hangs ({error})")
        except FileNotFoundError:
            pass  # the snapshot went with its publisher, whose death is found by who called it
        except WeightMismatch as error:
            if not self._proven:
                raise WeightMismatch(reason(error)) from error
            self._replace(actor, f"is wrong ({reason(error)})")
        else:
            self._proven = True
            return report
        return None

    async def stop(self) -> None:
        """Shut it down; killed if it does not answer within 20 s."""
        self.abandon()
        if self._started:
            stopping = asyncio.ensure_future(self._actor.call("stop"))
            try:
                await asyncio.wait([stopping], timeout=20)
            finally:
                answered = stopping.done()
                await cancelled([stopping])  # what it raised, if it was dead before, is of no concern
                self._actor.kill(hangs=not answered)
        else:
            self._actor.kill()

    def abandon(self) -> None:
        """It is nobody's concern any more: whatever becomes of it, it is not replaced."""
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

    async def _receive_weights(self, actor: Remote, group: Group | None) -> UpdateReport:
        snapshot = self._published.newest
        if group is None or snapshot is None or self.process not in group.members:
            return await self._take_weights(actor)
        what = f"{self.name} to receive {snapshot.role} weights v{snapshot.version}"
        try:
            work = actor.call("receive_weights", snapshot, self._published.timeout_s / 2)
            report: UpdateReport = await within(work, self._published.timeout_s, what)
        except BroadcastFailed as error:
            group.broken = group.broken or reason(error)
            return await self._take_weights(actor)
        return report

    async def _take_weights(self, actor: Remote) -> UpdateReport:
        published = self._published
        snapshot = await published.on(self.process.node)
        what = f"{self.name} to load {snapshot.role} weights v{snapshot.version}"
        try:
            report: UpdateReport = await within(actor.call("update_weights", snapshot), published.timeout_s, what)
        except FileNotFoundError:
            if snapshot is published.newest:
                raise  # it went with its publisher
            published.leave(self.process.node)  # it went with the node's relay
            snapshot = await published.on(self.process.node)
            report = await within(actor.call("update_weights", snapshot), published.timeout_s, what)
        return report

    async def _watch(self, actor: Remote) -> None:
        """Find out that it hangs. Not while it loads weights: that may take long, and has a limit of its own."""
        patience = self._patience.health_s
        while actor is self._actor:
            await asyncio.sleep(min(HEALTH_EVERY_S, patience / 4))
            try:
                silent = await silent_for(actor.call("answer"), patience)
            except RayActorError:
                self._replace(actor, DIED)
                return
            if silent and not self._published.lock.locked():
                self._replace(actor, f"hangs: no answer for {patience:g} s")

    def _replace(self, lost: Remote, how: str) -> None:
        if lost is not self._actor or self._replacing is not None or self._abandoned:
            return  # found out before, by another call, or of no concern
        if not self._started:
            return  # `start` finds out, and whoever called it decides
        self._notice(f"{self.name} (process {self.process.pid}) {how}; another takes its place")
        self._replacing = asyncio.create_task(self._successor(how))
        self._changed(self)

    async def _successor(self, how: str) -> None:
        while True:
            self._actor.kill(hangs=how != DIED)
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
                how = f"did not come back ({reason(error)})"
                self._notice(f"{self.name} {how}; it is tried again")
                continue
            self._replacing = None
            self._losses.recovered()
            self._notice(f"{self.name} is back (process {self.process.pid})")
            self._changed(self)
            return

    async def _load(self) -> None:
        """Load the newest snapshot. If its publisher has died, that is the one which the next publisher brings."""
        published = self._published
        while True:
            await published.readable.wait()
            async with published.lock:
                if published.newest is None:
                    return
                try:
                    await self._take_weights(self._actor)
                except FileNotFoundError:
                    published.forget()
                else:
                    self._proven = True
                    return
