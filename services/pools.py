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
from services.supervised import Patience, SupervisedEngine


class EnginePool:
    """The engines of one role. Created by `start`."""

    def __init__(
        self, engines: Sequence[SupervisedEngine], loading: asyncio.Lock, timeout_s: float, one_by_one: bool
    ) -> None:
        """loading: held from a snapshot's publication until all engines have it; the one the engines were given."""
        self._engines = engines
        self.loading = loading
        self._timeout = timeout_s
        self._one_by_one = one_by_one

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
        patience = Patience(e.start_timeout_s, e.health_timeout_s, e.max_restarts)
        loading = asyncio.Lock()
        engines = [
            SupervisedEngine(
                f"{role} engine {i}", partial(actor.options(**o).remote, settings), patience, loading, notice
            )
            for i, o in enumerate(options)
        ]
        await all_of([engine.start() for engine in engines])
        return cls(engines, loading, config.evaluation.timeout_s, config.weights.swap == "one_by_one")

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
        """Give every engine the snapshot; each verifies it. The caller holds `loading`.

        Returns when none loads any more, also if one raises: the snapshot's memory is free again then. No report comes
        from engines that are being replaced; their successors load it before they do anything.
        """
        at_once = 1 if self._one_by_one else len(self._engines)
        turns = asyncio.Semaphore(at_once)

        async def update(engine: SupervisedEngine) -> UpdateReport | None:
            async with turns:
                return await engine.update_weights(snapshot, timeout_s)

        outcomes = await asyncio.gather(*map(update, self._engines), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [report for report in outcomes if isinstance(report, UpdateReport)]

    def forget_weights(self) -> None:
        """The publisher of the last snapshot is gone."""
        for engine in self._engines:
            engine.forget_weights()

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
