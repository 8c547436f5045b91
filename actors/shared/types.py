"""Everything that travels between controller, engines and learner: numpy and tuples, no torch, no vLLM objects."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, order=True)
class SampleId:
    """Names one sample of a run for good: which demonstration, in which pass, which of its rollouts."""

    stage: int
    epoch: int
    index: int  # row of the demonstrations file's order, before shuffling
    generation: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.epoch}/{self.index}/{self.generation}"


@dataclass(frozen=True)
class Process:
    """Where an engine or a learner rank runs."""

    pid: int
    node: str  # Ray's id of the machine


@dataclass(frozen=True)
class Rendezvous:
    """Where a group for broadcasts meets (collective.py), and as what somebody comes. Rank 0 is the learner."""

    address: str
    port: int
    rank: int
    size: int
    timeout_s: float


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt to complete."""

    prompt_ids: IntArray  # [P]
    seed: int | None = None  # None: no seed of its own (greedy)


@dataclass(frozen=True)
class Sampling:
    """How an engine picks tokens; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """A completion the student sampled."""

    prompt_ids: IntArray  # [P]
    completion_ids: IntArray  # [T], the EOS token included when it was reached
    logprobs: FloatArray  # [T], the sampler's own log-prob of each completion token
    versions: tuple[tuple[int, int, int], ...]  # (weight version, start, end): tokens [start, end) came from it
    finish_reason: str  # "stop" (EOS) or "length"


@dataclass(frozen=True)
class TeacherScores:
    """The teacher's distribution at every completion token, cut to its top K."""

    ids: IntArray  # [T, K], most likely first
    logprobs: FloatArray  # [T, K]
    sampled: FloatArray  # [T], the teacher's log-prob of the student's own token
    version: int  # weight version of the teacher


@dataclass(frozen=True)
class ScoredRollout:
    """What the learner trains on."""

    sample: SampleId
    rollout: Rollout
    scores: TeacherScores


@dataclass(frozen=True)
class TensorEntry:
    """Where one parameter lies in a snapshot's payload."""

    name: str
    dtype: str  # torch's name: "bfloat16", "float32"
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int
    digest: str  # xxh3_128 of the bytes


@dataclass(frozen=True)
class Snapshot:
    """One version of one role's weights, in shared memory, with what is needed to verify that it arrived.

    With `scale` the tensors are LoRA adapters, to be merged into the base model (adapters.py).

    `path` is valid on `node`, while the publishing process holds the snapshot: it is anonymous memory of that process,
    so nothing is left behind whoever dies.
    """

    role: str  # "student" or "teacher"
    version: int  # 0: the weights in the model's folder
    path: str
    node: str  # Ray's id of the machine whose memory `path` names
    nbytes: int
    tensors: tuple[TensorEntry, ...]
    probe_ids: IntArray  # [N]
    probe_logprobs: FloatArray  # [N - 1], log-prob of each probe token after the first, by these very bytes
    scale: float | None = None

    def gap(self, logprobs: FloatArray) -> float:
        """How far an engine's log-probs of the probe [N - 1] are from these: their relative_gap."""
        return relative_gap(logprobs, self.probe_logprobs)


def relative_gap(logprobs: FloatArray, expected: FloatArray) -> float:
    """How far log-probs of a sequence [N] are from those expected: the mean of |difference| / max(1, |expected|).

    Relative, because bfloat16 rounds so: of a token with log-prob -25 two correct implementations differ by 0.9.
    The mean, because of one token in fifty they differ by ten times as much as of the others.
    """
    return float((np.abs(logprobs - expected) / np.maximum(1, np.abs(expected))).mean())


class SnapshotDamaged(Exception):
    """A snapshot's bytes are not those the learner packed. The engine has loaded nothing and serves what it had."""


class BroadcastFailed(Exception):
    """Weights did not come by broadcast, or not whole. An engine computes nothing before it has loaded others whole."""


class WeightMismatch(Exception):
    """An engine that has loaded a snapshot computes other log-probs than the learner: it must serve nothing."""


@dataclass(frozen=True)
class UpdateReport:
    """What a verified weight update took and how closely it agreed."""

    version: int
    probe_gap: float  # Snapshot.gap of the engine's log-probs
    pause_s: float  # how long generation stood still
