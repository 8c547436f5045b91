"""A test bench: a pool of simulated engines that records the engines it starts and the notices it sends."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from sdft.actors.shared.types import Snapshot
from sdft.learner.group import LearnerLost
from sdft.services.fleet.engine import Patience
from sdft.services.fleet.pool import EnginePool, PoolSettings
from sdft.services.fleet.snapshots import Published
from simulation.engine import SimulatedEngine

EMPTY = np.zeros(0, dtype=np.int32)


async def elsewhere(role: str) -> list[ray.ObjectRef]:
    raise LearnerLost("the learner died")


@dataclass
class Bench:
    """A pool with the engines it has started and the notices it has sent."""

    strict: bool = False
    least: int = 2
    most: int = 8
    room: int = 2
    one_by_one: bool = False
    make: Callable[[int], SimulatedEngine] = SimulatedEngine
    started: list[SimulatedEngine] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        patience = Patience(start_s=5, health_s=60, max_restarts=1)
        settings = PoolSettings(
            "student",
            self.least,
            self.most,
            self.strict,
            self.room,
            patience,
            5,
            drain_s=0.5,
            one_by_one=self.one_by_one,
        )
        self.pool = EnginePool(settings, self._create, Published(elsewhere), self.notices.append, lambda: "no room")

    def _create(self, number: int) -> SimulatedEngine:
        self.started.append(self.make(number))
        return self.started[-1]

    async def work(self, count: int) -> list[int]:
        """Dispatch `count` items. Returns the engine's number for each item, in the order of the items."""
        items: list[Any] = list(range(count))  # simulated engines accept any item
        sampling: Any = None
        results: list[Any] = await self.pool.generate(items, sampling)
        assert [item for _, item in results] == list(range(count))
        return [engine for engine, _ in results]

    async def begin(self, size: int) -> None:
        """Start the pool with `least` engines, then grow it to `size`."""
        await self.pool.start()
        self.pool.resize(size)
        await self.settled()

    async def settled(self) -> None:
        while self.pool.changing:
            await asyncio.sleep(0.01)

    async def publish(self, version: int, node: str = "here") -> None:
        async with self.pool.published.lock:
            snapshot = Snapshot("student", version, "", node, 0, (), EMPTY, EMPTY.astype(np.float32))
            await self.pool.update_weights(snapshot, 5)
