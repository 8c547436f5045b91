"""Types sent between controller, engines and learner: numpy and tuples, no torch or vLLM objects."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Handle = tuple[bytes | int, ...]  # of GPU memory, for another process of the machine (compat.py)
IntArray = NDArray[np.int32]
ExpertArray = NDArray[np.int16]
FloatArray = NDArray[np.float32]


class SampleId(NamedTuple):
    """Permanent identifier of a sample in a run: stage, epoch, record and which of its rollouts.

    A tuple, because the ledger looks a sample up six times, and a tuple hashes in C.
    """

    stage: int
    epoch: int
    record: int  # its index in the source, before shuffling
    generation: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.epoch}/{self.record}/{self.generation}"


class Support(NamedTuple):
    """The tokens whose log-probs the teacher gives at each position of a completion, besides the completion's own.

    teacher   its k most likely
    student   the student's k most likely (Rollout.likely)
    union     the student's k most likely, and the teacher's k most likely of the others
    full      every token
    """

    of: Literal["teacher", "student", "union", "full"]
    k: int  # 0 with full
    temperature: float = 1.0  # the teacher's logits are divided by it

    @property
    def likely(self) -> int:
        """Number of the student's most likely tokens that a rollout must have at each position."""
        return self.k if self.of in ("student", "union") else 0

    def width(self, vocabulary: int) -> int:
        """Return the number of tokens at each position."""
        return {"teacher": self.k, "student": self.k, "union": 2 * self.k, "full": vocabulary}[self.of]


@dataclass(frozen=True)
class Process:
    """Process and node of an engine or a learner rank."""

    pid: int
    node: str  # Ray's id of the machine


@dataclass(frozen=True)
class Rendezvous:
    """Address of a broadcast group (collective.py) and the rank of one member. Rank 0 is the learner."""

    address: str
    port: int
    rank: int
    size: int
    timeout_s: float  # limit for all members to join
    receive_s: float  # limit for one broadcast


class GenerateRequest(NamedTuple):
    """One prompt to complete."""

    prompt_ids: IntArray  # [P]
    seed: int | None = None  # None: no seed per request (greedy)


@dataclass(frozen=True)
class Sampling:
    """How an engine picks tokens; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    likely: int = 0  # most likely tokens that a rollout has at each position


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion that the student sampled."""

    prompt_ids: IntArray  # [P]
    completion_ids: IntArray  # [T], including the EOS token if it was reached
    logprobs: FloatArray  # [T], the sampler's own log-prob of each completion token
    versions: tuple[tuple[int, int, int], ...]  # (weight version, start, end): it sampled tokens [start, end)
    finish_reason: str  # "stop" (EOS) or "length"
    experts: ExpertArray | None = None  # [P + T, routers, k], chosen by the sampler; -1: not known. None: not kept
    likely: IntArray | None = (
        None  # [T, Sampling.likely], the sampler's most likely tokens at each position, likeliest first
    )


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """The teacher's distribution at every completion token, cut to the K tokens of a support."""

    ids: IntArray  # [T, K], distinct in a row. Of support teacher: most likely first
    logprobs: FloatArray  # [T, K]
    sampled: FloatArray  # [T], the teacher's log-prob of the student's own token
    version: int  # weight version of the teacher


@dataclass(frozen=True)
class TensorEntry:
    """Location of one parameter in a snapshot's payload."""

    name: str
    dtype: str  # torch's name: "bfloat16", "float32"
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int
    digest: str  # "sum:…" as sums.py says, of a snapshot that was packed on a GPU; else xxh3_128 of the bytes


@dataclass(frozen=True)
class Snapshot:
    """One version of one role's weights, with the data that verifies its arrival.

    With `scale` the tensors are LoRA adapters, which the receiver merges into the base model (adapters.py).

    The learner packs it into anonymous memory, so nothing is left behind when a process dies. `path` names that memory,
    and is valid on `node` until the role's next snapshot is packed. A transport may replace it (transport/protocol.py).
    With the transport `ipc` the memory is on the learner's GPU, and `handle` names it in the same way.
    """

    role: str  # of the pool that loads it (roles.py)
    version: int  # 0: the weights in the model folder
    path: str  # of a file with the payload; "": `handle` names the payload, or the transport streams it
    node: str  # Ray's id of the machine where the snapshot was packed
    nbytes: int
    tensors: tuple[TensorEntry, ...]
    probe_ids: IntArray  # [N]
    probe_logprobs: FloatArray  # [N - 1], log-prob of each probe token after the first, with these weights
    scale: float | None = None
    base: str = ""  # folder of the model that adapters are merged into; "": the one that the engine began with
    handle: Handle = ()  # of GPU memory with the payload; (): none

    def gap(self, logprobs: FloatArray) -> float:
        """relative_gap between an engine's log-probs of the probe [N - 1] and the snapshot's."""
        return relative_gap(logprobs, self.probe_logprobs)


def relative_gap(logprobs: FloatArray, expected: FloatArray) -> float:
    """Distance of log-probs [N] from the expected ones: the mean of |difference| / max(1, |expected|).

    The difference is relative, because bfloat16 rounding is: two correct implementations differ by 0.9 at a token with
    log-prob -25. The mean is taken, because at one token in fifty they differ by ten times as much as at the others.
    """
    return float((np.abs(logprobs - expected) / np.maximum(1, np.abs(expected))).mean())


class LearnerLost(Exception):
    """A rank died or does not answer. The training since the last checkpoint is lost."""


class SnapshotDamaged(Exception):
    """A snapshot's bytes differ from those that the learner packed. The engine loads nothing and keeps its weights."""


class NotReceived(Exception):
    """Weights did not arrive: a stream is incomplete, or a handle cannot be opened.

    After an incomplete stream the engine computes nothing until a complete load.
    """


class WeightMismatch(Exception):
    """Log-probs of an engine differ from the learner's with the same weights. The engine must not serve."""


@dataclass(frozen=True)
class UpdateReport:
    """Duration and probe gap of a verified weight update."""

    version: int
    probe_gap: float  # Snapshot.gap of the engine's log-probs
    pause_s: float  # how long generation was paused
