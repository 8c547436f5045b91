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
        self._canary: tuple[ServingEngine, Weights] | None = None
        self._condition = asyncio.Condition()
        self._waking: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self._starts_before = 0  # of engines that were removed
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
    def canary(self) -> int | None:
        """The release that one engine has for a share of the users."""
        return None if self._canary is None else self._canary[1].release

    def is_canary(self, engine: ServingEngine) -> bool:
        return self._canary is not None and self._canary[0] is engine

    def wanted(self, engine: ServingEngine) -> Weights:
        """Return the weights that an engine should have."""
        return self._canary[1] if self._canary is not None and self._canary[0] is engine else self.served

    def _free(self, canary: bool) -> list[ServingEngine]:
        """Return the engines that may take a request. canary: of a user whom the canary answers, if it is up."""
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
    def in_flight(self) -> int:
        return sum(e.in_flight for e in self.engines)

    @asynccontextmanager
    async def engine(self, timeout_s: float, canary: bool = False) -> AsyncIterator[ServingEngine]:
        """Hold the engine with the fewest requests for one request. Raises EnginesBusy after `timeout_s`.

        canary: the request is of a user whom the canary answers.
        """
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout_s), self._condition:
                await self._condition.wait_for(lambda: self._free(canary))
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
        """Take an engine out once it has ended its answers. Returns False if a release changes at this moment."""
        if self._changing.locked():
            return False
        async with self._changing:
            engine.draining = True
            try:
                async with asyncio.timeout(self._change_timeout_s), self._condition:
                    await self._condition.wait_for(lambda: engine.in_flight == 0)
            except TimeoutError:
                engine.draining = False
                return False
            self.engines.remove(engine)
            self._starts_before += engine.starts
            return True

    async def begin_canary(self, weights: Weights) -> float:
        """Have one engine serve a candidate. Returns the gap of the probe. Raises NotChanged."""
        async with self._changing:
            engine = self.engines[-1]
            self._canary = engine, weights
            try:
                return await self._change(engine, weights)
            except NotChanged:
                self._canary = None
                raise

    async def end_canary(self) -> None:
        """Have the canary's engine serve what the others do."""
        async with self._changing:
            if self._canary is None:
                return
            (engine, _), self._canary = self._canary, None
            try:
                await self._change(engine, self.served)
            except NotChanged:
                engine.kill()  # it starts again with the release that the others have

    async def change(self, weights: Weights) -> float:
        """Have all engines serve a release, one after the other. Returns the largest gap of the probe.

        A canary ends with it.

        Raises NotChanged if an engine does not; all serve the release of before then.
        """
        async with self._changing:
            before, gap, self._canary = self.served, 0.0, None
            self.served = weights  # for engines that start meanwhile
            try:
                for engine in list(self.engines):
                    gap = max(gap, await self._change(engine, weights))
            except asyncio.CancelledError:
                self.served = before
                raise
            except NotChanged:
                self.served = before
                for engine in list(self.engines):
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
