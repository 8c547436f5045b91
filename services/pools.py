"""A role's engines as one: batches are cut into equal runs of samples, weights go to all of them."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.types import GenerateRequest, IntArray, Rollout, Sampling, Snapshot, TeacherScores, UpdateReport
from actors.worker import EngineWorker
from learner.waiting import all_of
from services.config import RunConfig
from services.plan import engine_settings
from services.supervised import SupervisedEngine


class EnginePool:
    """The engines of one role. Created by `start`."""

    def __init__(self, engines: Sequence[SupervisedEngine], timeout_s: float) -> None:
        self._engines = engines
        self._timeout = timeout_s

    @classmethod
    async def start(
        cls,
        config: RunConfig,
        model: Path,
        role: str,
        options: Sequence[dict[str, Any]],
        notice: Callable[[str], None],
    ) -> "EnginePool":
        """Start one engine per entry of `options` (Ray actor options), as the configuration says. Takes 15 to 40 s.

        notice: is told of engines that die and are replaced.
        """
        e = config.actors.student if role == "student" else config.actors.teacher
        settings = engine_settings(config, model, role)
        actor = ray.remote(EngineWorker)
        engines = [
            SupervisedEngine(
                f"{role} engine {i}",
                partial(actor.options(**o).remote, settings),
                e.start_timeout_s,
                e.max_restarts,
                notice,
            )
            for i, o in enumerate(options)
        ]
        await all_of([engine.start() for engine in engines])
        return cls(engines, config.evaluation.timeout_s)

    @property
    def pids(self) -> list[int]:
        """Of the engines that there are now."""
        return [engine.pid for engine in self._engines]

    async def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        """Complete every prompt; in the order of the requests."""
        return await self._spread("generate", "to generate", requests, sampling)

    async def score(self, pairs: Sequence[tuple[IntArray, IntArray]], k: int) -> list[TeacherScores]:
        """Score every (teacher prompt, completion) pair; in order."""
        return await self._spread("score", "to score", pairs, k)

    async def update_weights(self, snapshot: Snapshot, timeout_s: float) -> list[UpdateReport]:
        """Give every engine the snapshot; each verifies it."""
        return await all_of([engine.update_weights(snapshot, timeout_s) for engine in self._engines])

    async def stop(self) -> None:
        """Shut every engine down."""
        await asyncio.gather(*(engine.stop() for engine in self._engines))

    async def _spread(self, method: str, what: str, items: Sequence[Any], argument: Any) -> list[Any]:
        """Contiguous, equal shares: which engine gets which item depends on nothing but their number."""
        n = len(self._engines)
        bounds = [len(items) * i // n for i in range(n + 1)]
        calls = [
            engine.call(f"{what} {b - a} sequences", self._timeout, method, items[a:b], argument)
            for engine, a, b in zip(self._engines, bounds, bounds[1:], strict=False)
            if b > a
        ]
        return [result for part in await all_of(calls) for result in part]
