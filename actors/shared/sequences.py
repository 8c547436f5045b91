"""The wire type to the learner: a sequence of tokens, which of them are in the loss, and what belongs to those.

    token_ids   │ prompt ........ │ completion ........ │ tool result .... │ completion ........ │
    loss_mask   │ False           │ False True True     │ False            │ True  True  True    │
    spans       │                 │ v7 ─────── v8 ───── │                  │ v8 ──────────────── │
    teacher     │                 │       row  row      │                  │ row   row   row     │

Packing, loss, recording and replay use nothing else of a sample. The controller holds drafts of sequences (drafts.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sdft.actors.shared.types import ExpertArray, FloatArray, IntArray, SampleId, TeacherScores

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of a sequence that were sampled with one weight version of the student.

    Tokens that the student did not sample, as a demonstration's, count as sampled with the version of the step before.
    """

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence of a batch. N tokens, of which M are in the loss."""

    sample: SampleId
    token_ids: IntArray  # [N]
    loss_mask: BoolArray  # [N]; never the first token, because nothing predicts it
    logprobs: FloatArray  # [N], the sampler's own log-probs; NaN where the student did not sample
    spans: tuple[Span, ...]  # ascending
    teacher: TeacherScores | None  # M rows, at the tokens in the loss; None: the loss needs no teacher
    seed: int  # of the sampling
    finish_reason: str  # of the last completion: "stop" or "length"
    objective: int = 0  # which of the stage's losses applies to it
    experts: ExpertArray | None = None  # [N, routers, k], as in Rollout; None: the learner's routers choose

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens in the spans: those of its completions."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def prompt_ids(self) -> IntArray:
        """The tokens before the first completion."""
        return self.token_ids[: self.spans[0].start]

    @property
    def turns(self) -> list[slice]:
        """The place of each completion, without what stands between them."""
        between = [i for i, (a, b) in enumerate(pairwise(self.spans), start=1) if a.end != b.start]
        parts = [self.spans[i:j] for i, j in pairwise([0, *between, len(self.spans)])]
        return [slice(part[0].start, part[-1].end) for part in parts]

    @property
    def completions(self) -> list[IntArray]:
        """The tokens of each completion."""
        return [self.token_ids[turn] for turn in self.turns]

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def student_loss_tokens(self) -> int:
        """Number of tokens in the loss that the student sampled."""
        return int((self.loss_mask & ~np.isnan(self.logprobs)).sum())

    @property
    def teacher_version(self) -> int | None:
        """The oldest weight version of the teacher that scored it; None without a teacher."""
        return None if self.teacher is None else self.teacher.version


def joined_experts(parts: Sequence[ExpertArray | int]) -> ExpertArray | None:
    """Join the experts of parts, with -1 for a part of which only the number of tokens is given.

    None: the experts of no part are given.
    """
    shape = next((part.shape[1:] for part in parts if not isinstance(part, int)), None)
    if shape is None:
        return None
    return np.concatenate([np.full((p, *shape), -1, np.int16) if isinstance(p, int) else p for p in parts])
