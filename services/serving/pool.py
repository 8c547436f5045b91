"""The engines of a service, and the release that they serve: who answers a request, and how all change their release.

A request holds one engine from its start to the end of its answer. An engine changes its release when it holds no
request, so an answer has one release.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from sdft.services.serving.engine import NotChanged, ServingEngine, Weights

CHANGES = 3  # tries to load a release, if the engine is lost meanwhile


class EnginesBusy(Exception):
    """No engine took the request within its time."""


class ServingPool:
    """The engines of a service, and the release that they serve."""

    def __init__(
        self, engines: Callable[["ServingPool"], list[ServingEngine]], served: Weights, change_timeout_s: float
    ) -> None:
        """engines(pool): makes them; they start with `pool.served`.

        change_timeout_s: how long one engine may take to end its answers, to start if it must, and to load a release.
        """
        self._change_timeout_s = change_timeout_s
        self.served = served
        self._condition = asyncio.Condition()
        self._waking: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self.waiting = 0  # requests that no engine has taken yet
        self.engines = engines(self)

    def notify(self) -> None:
        """Wake those who wait for an engine."""

        async def wake() -> None:
            async with self._condition:
                self._condition.notify_all()

        task = asyncio.get_running_loop().create_task(wake())
        self._waking.add(task)  # the loop keeps no reference
        task.add_done_callback(self._waking.discard)

    @property
    def ready(self) -> bool:
        return any(e.free for e in self.engines)

    @property
    def in_flight(self) -> int:
        return sum(e.in_flight for e in self.engines)

    @asynccontextmanager
    async def engine(self, timeout_s: float) -> AsyncIterator[ServingEngine]:
        """Hold the engine with the fewest requests for one request. Raises EnginesBusy after `timeout_s`."""
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout_s), self._condition:
                await self._condition.wait_for(lambda: self.ready)
                chosen = min((e for e in self.engines if e.free), key=lambda e: e.in_flight)
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

    async def change(self, weights: Weights) -> float:
        """Have all engines serve a release, one after the other. Returns the largest gap of the probe.

        Raises NotChanged if an engine does not; all serve the release of before then.
        """
        async with self._changing:
            before, gap = self.served, 0.0
            self.served = weights  # for engines that start meanwhile
            try:
                for engine in self.engines:
                    gap = max(gap, await self._change(engine, weights))
            except asyncio.CancelledError:
                self.served = before
                raise
            except NotChanged:
                self.served = before
                for engine in self.engines:
                    if engine.weights is not None and engine.weights.release != before.release:
                        with suppress(NotChanged):  # such an engine is started again, with the release of before
                            await self._change(engine, before)
                raise
            return gap

    async def _change(self, engine: ServingEngine, weights: Weights) -> float:
        engine.draining = True
        try:
            async with asyncio.timeout(self._change_timeout_s):
                return await self._change_idle(engine, weights)
        except TimeoutError:
            text = f"{engine.name} did not change within {self._change_timeout_s:g} s ({engine.in_flight} in flight)"
            raise NotChanged(text, refused=False) from None
        finally:
            engine.draining = False
            self.notify()

    async def _change_idle(self, engine: ServingEngine, weights: Weights) -> float:
        """Change an engine once it holds no request and is up. One that is lost meanwhile starts with the release."""
        for attempt in range(CHANGES):
            async with self._condition:
                await self._condition.wait_for(lambda: engine.in_flight == 0 and engine.weights is not None)
            if engine.weights is not None and engine.weights.release == weights.release:
                return 0.0
            try:
                return await engine.change(weights)
            except NotChanged as error:
                if error.refused or attempt == CHANGES - 1:
                    raise
        raise AssertionError("unreachable")
