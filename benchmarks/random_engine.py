"""An engine actor without a model, which samples and scores at once, for benchmarks of what is around it."""

from typing import Any

import numpy as np

from sdft.actors.shared.types import GenerateRequest, IntArray, Rollout, Sampling, TeacherScores
from sdft.actors.worker import EngineWorker


class RandomEngine:
    """An engine that samples and scores at once."""

    dead = False

    async def generate(self, requests: list[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        n = sampling.max_new_tokens
        ids, logprobs = np.zeros(n, np.int32), np.zeros(n, np.float32)
        return [Rollout(r.prompt_ids, ids, logprobs, ((0, 0, n),), "length") for r in requests]

    async def score(
        self, pairs: list[tuple[IntArray, IntArray]], k: int, temperature: float = 1.0
    ) -> list[TeacherScores]:
        rng = np.random.default_rng(0)
        return [
            TeacherScores(
                rng.integers(0, 40000, (len(ids), k)).astype(np.int32),
                rng.random((len(ids), k), np.float32),
                np.zeros(len(ids), np.float32),
                0,
            )
            for _, ids in pairs
        ]


class Worker(EngineWorker):
    """The actor of an engine, around this engine."""

    def __init__(self) -> None:
        self._engine: Any = RandomEngine()
