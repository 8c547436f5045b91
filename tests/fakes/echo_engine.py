"""An engine without a model: it repeats the prompt. Its log-probs depend only on the weight version."""

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

from sdft.actors.engine import Engine
from sdft.actors.shared.types import (
    FloatArray,
    GenerateRequest,
    IntArray,
    Rollout,
    Sampling,
    Snapshot,
    TeacherScores,
    UpdateReport,
)


class EchoEngine(Engine):
    """Completes a prompt with its own tokens, up to the limit of the sampling."""

    version = 0

    async def start(self) -> None: ...

    async def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        return [self._rollout(request.prompt_ids, sampling.max_new_tokens) for request in requests]

    async def score(
        self, pairs: Sequence[tuple[IntArray, IntArray]], k: int, temperature: float = 1.0
    ) -> list[TeacherScores]:
        return [self._scores(completion, k) for _, completion in pairs]

    async def probe(self, ids: IntArray) -> FloatArray:
        return self._logprobs(len(ids) - 1)

    async def update_weights(self, snapshot: Snapshot) -> UpdateReport:
        self.version = snapshot.version  # an engine with a model loads the tensors and compares the probe here
        return UpdateReport(snapshot.version, probe_gap=0.0, pause_s=0.0)

    async def ping(self) -> None: ...

    def stop(self) -> None: ...

    def _rollout(self, prompt: IntArray, length: int) -> Rollout:
        tokens = np.fromiter(islice(cycle(prompt.tolist()), length), np.int32)
        return Rollout(prompt, tokens, self._logprobs(length), ((self.version, 0, length),), "length")

    def _scores(self, completion: IntArray, k: int) -> TeacherScores:
        logprobs = self._logprobs(len(completion))
        ids = completion[:, None] + np.arange(k, dtype=np.int32)
        return TeacherScores(ids, np.repeat(logprobs[:, None], k, axis=1), logprobs, self.version)

    def _logprobs(self, length: int) -> FloatArray:
        return np.full(length, -1 - self.version, np.float32)
