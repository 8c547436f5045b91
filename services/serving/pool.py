"""The engines of a service, and the release that they serve: who answers a request.

A request holds one engine from its start to the end of its answer. An engine changes its release when it holds no
request (`changing.py`), so an answer has one release.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from sdft.services.serving.engine import ServingEngine, Weights


class EnginesBusy(Exception):
    """No engine took the request within its time."""


class ServingPool:
    """The engines of a service, and the release that they serve."""

    def __init__(self, engines: Callable[["ServingPool"], list[ServingEngine]], served: Weights) -> None:
        """engines(pool): makes them; they start with what `wanted` says."""
        self.served = served
        self.canary_on: tuple[ServingEngine, Weights] | None = None
        self.condition = asyncio.Condition()
        self._waking: set[asyncio.Task[None]] = set()
        self.changing = asyncio.Lock()
        self._starts_before = self._losses_before = 0  # of engines that were removed
        self.waiting = 0  # requests that no engine has taken yet
        # Of the last streams, when each began (time.monotonic), and after how many seconds.
        self.begun: deque[tuple[float, float]] = deque(maxlen=1000)
        self.engines = engines(self)

    def notify(self) -> None:
        """Wake those who wait for an engine."""

        async def wake() -> None:
            async with self.condition:
                self.condition.notify_all()

        task = asyncio.get_running_loop().create_task(wake())
        self._waking.add(task)  # the loop keeps no reference
        task.add_done_callback(self._waking.discard)

    @property
    def canary(self) -> int | None:
        """The release that one engine has for a share of the users."""
        return None if self.canary_on is None else self.canary_on[1].release

    def is_canary(self, engine: ServingEngine) -> bool:
        return self.canary_on is not None and self.canary_on[0] is engine

    def wanted(self, engine: ServingEngine) -> Weights:
        """Return the weights that an engine should have."""
        return self.canary_on[1] if self.canary_on is not None and self.canary_on[0] is engine else self.served

    def _free(self, canary: bool) -> list[ServingEngine]:
        """Return the engines that may take a request. canary: as for `engine`."""
        free = [e for e in self.engines if e.free]
        own = [e for e in free if self.is_canary(e) == canary]
        return own or (free if canary else [])

    @property
    def ready(self) -> bool:
        return any(e.free for e in self.engines)

    @property
    def starts(self) -> int:
        """Starts of engines, those that were removed included."""
        return self._starts_before + sum(e.starts for e in self.engines)

    @property
    def losses(self) -> int:
        """Ends of engines that were up, those that were removed included."""
        return self._losses_before + sum(e.losses for e in self.engines)

    @property
    def newest_of_two(self) -> ServingEngine | None:
        """The newest engine that takes requests, if another one does, too."""
        free = [e for e in self.engines if e.free]
        return free[-1] if len(free) > 1 else None

    @property
    def in_flight(self) -> int:
        return sum(e.in_flight for e in self.engines)

    @asynccontextmanager
    async def engine(self, timeout_s: float, canary: bool = False) -> AsyncIterator[ServingEngine]:
        """Hold the engine with the fewest requests for one request. Raises EnginesBusy after `timeout_s`.

        canary: the user is in the canary's share.
        """
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout_s), self.condition:
                await self.condition.wait_for(lambda: self._free(canary))
                chosen = min(self._free(canary), key=lambda e: e.in_flight)
                chosen.in_flight += 1
        except TimeoutError:
            raise EnginesBusy(f"no engine took the request within {timeout_s:g} s") from None
        finally:
            self.waiting -= 1
        try:
            yield chosen
        finally:
            chosen.in_flight -= 1
            if chosen.draining:
                self.notify()

    async def remove(self, engine: ServingEngine) -> bool:
        """Take an engine out once it has ended its answers. Returns False if a release changes at this moment.

        If cancelled, the engine takes requests again.
        """
        if self.changing.locked():
            return False
        async with self.changing:
            engine.draining = True
            try:
                async with self.condition:
                    await self.condition.wait_for(lambda: engine.in_flight == 0)
                self.engines.remove(engine)
            except asyncio.CancelledError:
                engine.draining = False
                self.notify()
                raise
            self._starts_before += engine.starts
            self._losses_before += engine.losses
            return True
