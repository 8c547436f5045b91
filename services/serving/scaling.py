"""The number of engines: more when requests queue or answers begin late, fewer when engines have little to do.

    load = requests that are answered or wait;  room = service.serving.max_num_seqs, what one engine decodes at once
    late = the streams that began in the last grow_after_s took more than first_token_s to begin, on average

    load > engines * room, or late                  for grow_after_s    ─► one engine more, up to max_replicas
    load <= (engines - 1) * room / 2, and not late  for shrink_after_s  ─► one engine fewer, down to replicas

An engine that starts counts, so a queue that lasts until it is up adds one engine each grow_after_s, not more. In a
cluster an engine that finds no room makes Ray's autoscaler add a node, and an engine that leaves frees one.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from statistics import fmean

from sdft.services.config.service import ServingConfig
from sdft.services.serving.engine import ServingEngine
from sdft.services.serving.pool import ServingPool

EVERY_S = 0.5


@dataclass
class Policy:
    """Decides when the number of engines changes."""

    least: int
    most: int
    room: int
    grow_after_s: float
    shrink_after_s: float
    first_token_s: float | None = None
    _queues_since: float | None = None
    _idle_since: float | None = None

    @classmethod
    def of(cls, serving: ServingConfig) -> "Policy":
        return cls(
            least=serving.replicas,
            most=serving.max_replicas or serving.replicas,
            room=serving.max_num_seqs,
            grow_after_s=serving.grow_after_s,
            shrink_after_s=serving.shrink_after_s,
            first_token_s=serving.first_token_s,
        )

    def change(self, now: float, load: int, engines: int, begun: Iterable[tuple[float, float]] = ()) -> int:
        """Return 1 for one engine more, -1 for one fewer, 0 for neither.

        now: of a clock that only rises. begun: of the last streams, when each began by that clock, and after how long.
        """
        late = self._late(now, begun)
        queues = engines < self.most and (load > engines * self.room or late)
        idle = engines > self.least and load <= (engines - 1) * self.room / 2 and not late
        self._queues_since = _since(self._queues_since, now, queues)
        self._idle_since = _since(self._idle_since, now, idle)
        if self._queues_since is not None and now - self._queues_since >= self.grow_after_s:
            self._queues_since = None
            return 1
        if self._idle_since is not None and now - self._idle_since >= self.shrink_after_s:
            self._idle_since = None
            return -1
        return 0

    def _late(self, now: float, begun: Iterable[tuple[float, float]]) -> bool:
        if self.first_token_s is None:
            return False
        seconds = [after for when, after in begun if now - when <= self.grow_after_s]
        return bool(seconds) and fmean(seconds) > self.first_token_s


def _since(before: float | None, now: float, holds: bool) -> float | None:
    """Return since when something holds; None: it does not hold."""
    if not holds:
        return None
    return now if before is None else before


class Scaling:
    """Runs the engines of a pool, and changes their number."""

    def __init__(
        self,
        pool: ServingPool,
        policy: Policy,
        make: Callable[[int], ServingEngine],
        notice: Callable[[str], None],
    ) -> None:
        """make(number): returns an engine that is not started."""
        self._pool, self._policy, self._make, self._notice = pool, policy, make, notice
        self._running: dict[ServingEngine, asyncio.Task[None]] = {}
        self._removing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Run the engines until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for engine in self._pool.engines:
                self._running[engine] = tasks.create_task(engine.run(), name=engine.name)
            while True:
                await asyncio.sleep(EVERY_S)
                pool, clock = self._pool, asyncio.get_running_loop()
                load = pool.in_flight + pool.waiting
                change = self._policy.change(clock.time(), load, len(pool.engines), pool.begun)
                if change > 0 and self._is_removing:
                    await self._keep()
                elif change > 0:
                    engine = self._make(self._free_number())
                    pool.engines.append(engine)
                    self._running[engine] = tasks.create_task(engine.run(), name=engine.name)
                    self._notice(f"{engine.name} is added: {load} requests, {len(pool.engines)} engines now")
                elif change < 0 and not self._is_removing:
                    self._removing = tasks.create_task(self._remove(load), name="remove an engine")

    @property
    def _is_removing(self) -> bool:
        return self._removing is not None and not self._removing.done()

    async def _keep(self) -> None:
        """Give up the removal of an engine that still ends its answers: it is needed again."""
        assert self._removing is not None
        self._removing.cancel()
        await asyncio.wait([self._removing])

    def _free_number(self) -> int:
        names = {engine.name for engine in self._running}
        return next(i for i in count() if f"engine {i}" not in names)

    async def _remove(self, load: int) -> None:
        """Take out the engine that does least, the newest of them, once it has ended its answers."""
        others = [e for e in reversed(self._pool.engines) if not self._pool.is_canary(e)]
        engine = min(others, key=lambda e: (e.weights is not None, e.in_flight))
        if not await self._pool.remove(engine):
            return
        task = self._running[engine]
        task.cancel()
        try:
            await asyncio.wait([task])
        finally:
            del self._running[engine]
        self._notice(f"{engine.name} is removed: {load} requests, {len(self._pool.engines)} engines now")
