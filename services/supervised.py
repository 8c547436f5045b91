"""One engine's place in a pool. An engine that is dead, hung or wrong is replaced, and its work done once more.

    up ── an actor's death (every call fails) ──────────────┐
     │ ── no answer for health_timeout_s: killed ───────────┼─► replaced: start, load the newest weights, verified ─► up
     │ ── log-probs that are not the learner's: killed ─────┘    (too often: every call raises, the run ends)

A batch's share is enqueued whole in whatever engine does it, with the samples' own seeds, so the result is the same to
the last bit.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.types import Snapshot, SnapshotDamaged, UpdateReport, WeightMismatch
from learner.waiting import silent_for, within

HEALTH_EVERY_S = 10  # at most
HOUR_S = 3600
LONGEST_BACK_OFF_S = 60


@dataclass(frozen=True)
class Patience:
    """How long an engine may take, and how often it is replaced."""

    start_s: float
    health_s: float  # without an answer before it counts as hung
    max_restarts: int  # in an hour


class Losses:
    """How often something was lost in the last hour, and how long to wait before it is started once more."""

    def __init__(self) -> None:
        self._when: deque[float] = deque()
        self._in_a_row = 0

    def count(self) -> int:
        """One more: how many there were within an hour."""
        self._in_a_row += 1
        self._when.append(time.monotonic())
        while self._when[-1] - self._when[0] > HOUR_S:
            self._when.popleft()
        return len(self._when)

    def recovered(self) -> None:
        """It has worked since."""
        self._in_a_row = 0

    @property
    def back_off_s(self) -> float:
        """None after the first in a row, then 1 s, 3 s, 7 s and so on."""
        return min(2.0 ** (self._in_a_row - 1) - 1, LONGEST_BACK_OFF_S)


class SupervisedEngine:
    """The engine that holds a place in a pool, whoever that is at the time."""

    def __init__(
        self,
        name: str,
        create: Callable[[], ActorHandle],
        patience: Patience,
        loading: asyncio.Lock,
        notice: Callable[[str], None],
    ) -> None:
        """name: "teacher engine 0". create: makes an actor in this place. notice: is told what happens to it.

        loading: held by whoever publishes a snapshot until all engines have it; an engine that comes later takes it to
        load the last one, which is overwritten by the next.
        """
        self.name = name
        self.pid = 0
        self._losses = Losses()
        self._create, self._patience = create, patience
        self._loading, self._notice = loading, notice
        self._actor = create()
        self._replacing: asyncio.Task[None] | None = None
        self._snapshot: tuple[Snapshot, float] | None = None  # None: serves the model as it was loaded
        self._current = asyncio.Event()  # the snapshot can still be read
        self._current.set()
        self._proven = False  # has loaded a snapshot and agreed with the learner
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model, in 15 to 40 s."""
        self.pid = await within(self._actor.start.remote(), self._patience.start_s, f"{self.name} to load its model")
        self._watching = asyncio.create_task(self._watch(self._actor))

    async def call(self, what: str, timeout_s: float, method: str, *arguments: Any) -> Any:
        """The result of an actor's method, by a successor if it is lost on the way. RuntimeError if too many were."""
        while True:
            actor = await self._up()
            work = getattr(actor, method).remote(*arguments)
            try:
                return await within(work, timeout_s, f"{self.name} {what}")
            except RayActorError:
                self._replace(actor, "died")
            except asyncio.CancelledError:
                ray.cancel(work)
                raise

    async def update_weights(self, snapshot: Snapshot, timeout_s: float) -> UpdateReport | None:
        """Load a snapshot; the caller holds `loading`. None: it is being replaced, its successor will load it.

        Raises SnapshotDamaged, and WeightMismatch if it was the engine's first.
        """
        self._snapshot = snapshot, timeout_s
        self._current.set()
        if self._replacing is not None:
            return None
        actor = self._actor
        what = f"{self.name} to load {snapshot.role} weights v{snapshot.version}"
        try:
            report: UpdateReport = await within(actor.update_weights.remote(snapshot), timeout_s, what)
        except RayActorError:
            self._replace(actor, "died")
        except TimeoutError as error:
            self._replace(actor, f"hangs ({error})")
        except FileNotFoundError:
            pass  # the snapshot went with its publisher, whose death is found by who called it
        except WeightMismatch as error:
            if not self._proven:
                raise
            self._replace(actor, f"is wrong ({reason(error)})")
        else:
            self._proven = True
            return report
        return None

    async def stop(self) -> None:
        """Shut it down; killed if it does not answer within 20 s."""
        for task in (self._watching, self._replacing):
            if task is not None:
                task.cancel()
        await asyncio.wait([asyncio.wrap_future(self._actor.stop.remote().future())], timeout=20)
        ray.kill(self._actor)  # seen to by its node's Ray, also if the process was stopped

    async def _up(self) -> ActorHandle:
        """The actor, once there is one that is well."""
        while self._replacing is not None:
            await asyncio.shield(self._replacing)
        return self._actor

    async def _watch(self, actor: ActorHandle) -> None:
        """Find out that it hangs. Not while it loads weights: that may take long, and has a limit of its own."""
        patience = self._patience.health_s
        while actor is self._actor:
            await asyncio.sleep(min(HEALTH_EVERY_S, patience / 4))
            try:
                silent = await silent_for(actor.answer.remote(), patience)
            except RayActorError:
                self._replace(actor, "died")
                return
            if silent and not self._loading.locked():
                self._replace(actor, f"hangs: no answer for {patience:g} s")

    def _replace(self, lost: ActorHandle, how: str) -> None:
        if lost is not self._actor or self._replacing is not None:
            return  # found out before, by another call
        self._notice(f"{self.name} (process {self.pid}) {how}; another takes its place")
        self._replacing = asyncio.create_task(self._successor(how))

    async def _successor(self, how: str) -> None:
        while True:
            ray.kill(self._actor)
            times = self._losses.count()
            if times > self._patience.max_restarts:
                raise RuntimeError(
                    f"{self.name} was lost {times} times within an hour (actors.*.max_restarts: "
                    f"{self._patience.max_restarts}); the last time it {how}"
                )
            await asyncio.sleep(self._losses.back_off_s)
            self._actor, self._proven = self._create(), False
            try:
                await self.start()
                await self._load()
            except (RayActorError, TimeoutError, SnapshotDamaged) as error:
                how = f"did not come back ({reason(error)})"
                continue
            self._replacing = None
            self._losses.recovered()
            self._notice(f"{self.name} is back (process {self.pid})")
            return

    async def _load(self) -> None:
        """Load the newest snapshot. If its publisher has died, that is the one which the next publisher brings."""
        while True:
            await self._current.wait()
            async with self._loading:
                if self._snapshot is None:
                    return
                snapshot, timeout_s = self._snapshot
                what = f"{self.name}, newly started, to load {snapshot.role} weights v{snapshot.version}"
                try:
                    await within(self._actor.update_weights.remote(snapshot), timeout_s, what)
                except FileNotFoundError:
                    self._current.clear()
                else:
                    self._proven = True
                    return

    def forget_weights(self) -> None:
        """The publisher of the last snapshot has died: a successor does nothing before there is another."""
        self._current.clear()


def reason(error: BaseException) -> str:
    """What went wrong, in one line. Ray wraps what an actor raises into a text with its whole traceback."""
    text = str(getattr(error, "cause", error))
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
