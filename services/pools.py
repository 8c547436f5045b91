"""A role's engines as one: batches are cut into equal runs of samples, weights go to all of them."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.types import GenerateRequest, IntArray, Rollout, Sampling, Snapshot, TeacherScores, UpdateReport
from actors.worker import EngineWorker
from learner.waiting import all_within
from services.config import RunConfig
from services.plan import engine_settings


class EnginePool:
    """The engines of one role. Created by `start`."""

    def __init__(self, role: str, engines: Sequence[ActorHandle], timeout_s: float) -> None:
        self.role = role
        self.engines = engines
        self.pids: list[int] = []
        self._timeout = timeout_s

    @classmethod
    async def start(cls, config: RunConfig, model: Path, role: str, options: Sequence[dict[str, Any]]) -> "EnginePool":
        """Start one engine per entry of `options` (Ray actor options), as the configuration says. Takes 15 to 40 s."""
        e = config.actors.student if role == "student" else config.actors.teacher
        settings = engine_settings(config, model, role)
        actor = ray.remote(EngineWorker)
        pool = cls(role, [actor.options(**o).remote(settings) for o in options], config.evaluation.timeout_s)
        pool.pids = await all_within(
            [engine.start.remote() for engine in pool.engines],
            e.start_timeout_s,
            f"{len(options)} {role} engine(s) to load {model}",
        )
        return pool

    async def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        """Complete every prompt; in the order of the requests."""
        return await self._spread("generate", "to generate", requests, sampling)

    async def score(self, pairs: Sequence[tuple[IntArray, IntArray]], k: int) -> list[TeacherScores]:
        """Score every (teacher prompt, completion) pair; in order."""
        return await self._spread("score", "to score", pairs, k)

    async def update_weights(self, snapshot: Snapshot, timeout_s: float) -> list[UpdateReport]:
        """Give every engine the snapshot; each verifies it."""
        return await all_within(
            [engine.update_weights.remote(snapshot) for engine in self.engines],
            timeout_s,
            f"the {self.role} engines to load {snapshot.role} weights v{snapshot.version}",
        )

    async def stop(self) -> None:
        """Shut every engine down; one that does not answer within 20 s is killed."""
        stops = [asyncio.wrap_future(engine.stop.remote().future()) for engine in self.engines]
        await asyncio.wait(stops, timeout=20)
        for engine in self.engines:
            ray.kill(engine)

    async def _spread(self, method: str, what: str, items: Sequence[Any], argument: Any) -> list[Any]:
        """Contiguous, equal shares: which engine gets which item depends on nothing but their number."""
        n = len(self.engines)
        bounds = [len(items) * i // n for i in range(n + 1)]
        calls = [
            getattr(engine, method).remote(items[a:b], argument)
            for engine, a, b in zip(self.engines, bounds, bounds[1:], strict=False)
            if b > a
        ]
        parts = await all_within(calls, self._timeout, f"the {self.role} engines {what} {len(items)} sequences")
        return [result for part in parts for result in part]
