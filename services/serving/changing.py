"""How the engines of a pool change their release: one after the other, each once it holds no request.

    change        all engines            a canary's engine first: no other user may get the canary's release
    begin_canary  one engine             while another one goes on with the served release
    end_canary    the canary's engine    back to the served release

An engine that is not up is not waited for: it starts with what the pool wants by then. One change at a time.
"""

import asyncio
from contextlib import suppress

from sdft.services.serving.engine import NotChanged, ServingEngine, Weights
from sdft.services.serving.pool import ServingPool

CHANGES = 3  # tries to load a release, if the engine is lost meanwhile


class Changing:
    """Changes the releases of a pool's engines."""

    def __init__(self, pool: ServingPool, timeout_s: float) -> None:
        """timeout_s: how long one engine may take to end its answers and to load a release."""
        self._pool, self._timeout_s = pool, timeout_s

    async def change(self, weights: Weights) -> float:
        """Have all engines serve a release. Returns the largest gap of the probe. A canary ends with it.

        Raises NotChanged if an engine does not; all serve the release of before then. If no engine is up, it waits for
        one to start with the release.
        """
        pool = self._pool
        async with pool.changing:
            before, gap = pool.served, 0.0
            first_of_all = [e for e in pool.engines if pool.is_canary(e)]
            order = [*first_of_all, *(e for e in pool.engines if e not in first_of_all)]
            pool.served, pool.canary_on = weights, None  # for engines that start meanwhile
            for engine in first_of_all:
                engine.draining = True  # it has the canary's release, and counts as any other engine now
            try:
                for engine in order:
                    if not engine.down:
                        gap = max(gap, await self._change(engine, weights))
                await self._one_has(weights)
            except asyncio.CancelledError:
                pool.served = before
                raise
            except NotChanged:
                pool.served = before
                for engine in list(pool.engines):
                    if engine.weights is not None and engine.weights.release != before.release:
                        with suppress(NotChanged):  # such an engine is started again, with the release of before
                            await self._change(engine, before)
                raise
            finally:
                for engine in first_of_all:
                    engine.draining = False
                pool.notify()
            return gap

    async def begin_canary(self, weights: Weights) -> float:
        """Have one engine serve a candidate. Returns the gap of the probe. Raises NotChanged.

        It is the canary's engine of before, if there is one, else the newest engine that takes requests. Another one
        must take requests, too (`ServingPool.newest_of_two`).
        """
        pool = self._pool
        async with pool.changing:
            engine = pool.canary_on[0] if pool.canary_on is not None else pool.newest_of_two
            if engine is None:
                raise NotChanged("a canary needs an engine beside the one that serves the release", refused=False)
            pool.canary_on = engine, weights
            try:
                return await self._change(engine, weights)
            except NotChanged:
                pool.canary_on = None
                raise

    async def end_canary(self) -> None:
        """Have the canary's engine serve what the others do."""
        pool = self._pool
        async with pool.changing:
            if pool.canary_on is None:
                return
            (engine, _), pool.canary_on = pool.canary_on, None
            try:
                if engine.down:
                    return  # it starts with the release that the others have
                await self._change(engine, pool.served)
            except NotChanged:
                engine.kill()  # the same

    async def _one_has(self, weights: Weights) -> None:
        """Wait until an engine serves the release. Raises NotChanged."""
        pool = self._pool

        def has() -> bool:
            return any(e.weights is not None and e.weights.release == weights.release for e in pool.engines)

        try:
            async with asyncio.timeout(self._timeout_s), pool.condition:
                await pool.condition.wait_for(has)
        except TimeoutError:
            text = f"no engine came up with release {weights.release} within {self._timeout_s:g} s"
            raise NotChanged(text, refused=False) from None

    async def _change(self, engine: ServingEngine, weights: Weights) -> float:
        engine.draining = True
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._change_idle(engine, weights)
        except TimeoutError:
            text = f"{engine.name} did not change within {self._timeout_s:g} s ({engine.in_flight} in flight)"
            raise NotChanged(text, refused=False) from None
        finally:
            engine.draining = False
            self._pool.notify()

    async def _change_idle(self, engine: ServingEngine, weights: Weights) -> float:
        """Change an engine once it holds no request. One that is lost meanwhile starts with the release."""
        for attempt in range(CHANGES):
            async with self._pool.condition:
                await self._pool.condition.wait_for(
                    lambda: engine.in_flight == 0 and (engine.down or engine.weights is not None)
                )
            if engine.weights is None or engine.weights.release == weights.release:
                return 0.0
            try:
                return await engine.change(weights)
            except NotChanged as error:
                if error.refused or attempt == CHANGES - 1:
                    raise
        raise AssertionError("unreachable")
