"""A test bench: a pool of simulated engines that records the engines it starts and the notices it sends."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdft.actors.shared.types import LearnerLost, Snapshot
from sdft.actors.transport.memory import MemoryTransport
from sdft.actors.transport.protocol import WeightTransport
from sdft.services.fleet.engine import Patience
from sdft.services.fleet.pool import EnginePool, PoolSettings
from simulation.engine import SimulatedEngine

EMPTY = np.zeros(0, dtype=np.int32)


class LostLearner:
    """Raises LearnerLost from every call of a transport."""

    async def payload(self, role: str) -> list[Any]:
        raise LearnerLost("the learner died")

    async def sender(self, method: str, seconds: float, what: str, *arguments: Any) -> Any:
        raise LearnerLost("the learner died")


class Elsewhere(LostLearner):
    """Sends an empty payload."""

    async def payload(self, role: str) -> list[Any]:
        return []


@dataclass
class Bench:
    """A pool with the engines it has started and the notices it has sent."""

    strict: bool = False
    least: int = 2
    most: int = 8
    room: int = 2
    one_by_one: bool = False
    make: Callable[[int], SimulatedEngine] = SimulatedEngine
    transport: WeightTransport | None = None  # None: memory, with the learner lost
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
        transport = self.transport or MemoryTransport("student", LostLearner, self.notices.append)
        self.pool = EnginePool(settings, self._create, transport, self.notices.append, lambda: "no room")

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
        async def offer() -> Snapshot:
            return Snapshot("student", version, "/memory", node, 0, (), EMPTY, EMPTY.astype(np.float32))

        async with self.pool.versions.offering(offer, timeout_s=5) as snapshot:
            await self.pool.update_weights(snapshot)

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[None]:
        """Keep the newest version in use."""
        async with self.pool.versions.loading():
            yield
