"""The wire type to the learner: a sequence of tokens, which of them are in the loss, and what belongs to those.

    token_ids   │ prompt ........ │ completion ........ │ tool result .... │ completion ........ │
    loss_mask   │ False           │ False True True     │ False            │ True  True  True    │
    spans       │                 │ v7 ─────── v8 ───── │                  │ v8 ──────────────── │
    teacher     │                 │       row  row      │                  │ row   row   row     │

Packing, loss, recording and replay use nothing else of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sdft.actors.shared.types import FloatArray, IntArray, Rollout, SampleId, TeacherScores

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
    def completions(self) -> list[IntArray]:
        """The tokens of each completion, without what stands between them."""
        between = [i for i, (a, b) in enumerate(pairwise(self.spans), start=1) if a.end != b.start]
        parts = [self.spans[i:j] for i, j in pairwise([0, *between, len(self.spans)])]
        return [self.token_ids[part[0].start : part[-1].end] for part in parts]

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Turn:
    """A completion, what precedes it since the turn before, and the teacher's scores of it."""

    context_ids: IntArray  # [C], not in the loss
    rollout: Rollout  # its prompt_ids are not used
    scores: TeacherScores | None = None  # T rows, one per completion token
    mask: BoolArray | None = None  # [T], completion tokens in the loss; None: all


def sequence_of(
    sample: SampleId, seed: int, turns: Sequence[Turn], skip_first: int = 0, objective: int = 0
) -> TrainingSequence:
    """Join turns into one sequence. The first `skip_first` tokens of each completion are left out of the loss.

    Either all turns have scores, or none has.
    """
    ids: list[IntArray] = []
    masks: list[BoolArray] = []
    logprobs: list[FloatArray] = []
    spans: list[Span] = []
    scores: list[TeacherScores] = []
    offset = 0
    for turn in turns:
        context, completion = turn.context_ids, turn.rollout.completion_ids
        mask = np.ones(len(completion), dtype=np.bool_) if turn.mask is None else turn.mask.copy()
        mask[:skip_first] = False
        ids += [context, completion]
        masks += [np.zeros(len(context), dtype=np.bool_), mask]
        logprobs += [np.full(len(context), np.nan, dtype=np.float32), turn.rollout.logprobs]
        offset += len(context)
        spans += [Span(version, offset + start, offset + end) for version, start, end in turn.rollout.versions]
        offset += len(completion)
        if turn.scores is not None:
            s = turn.scores
            scores.append(TeacherScores(s.ids[mask], s.logprobs[mask], s.sampled[mask], s.version))
    if scores and len(scores) < len(turns):
        raise ValueError(f"sample {sample}: {len(scores)} of {len(turns)} turns have scores; give all of them, or none")
    return TrainingSequence(
        sample=sample,
        token_ids=np.concatenate(ids),
        loss_mask=np.concatenate(masks),
        logprobs=np.concatenate(logprobs),
        spans=tuple(spans),
        teacher=_joined(scores) if scores else None,
        seed=seed,
        finish_reason=turns[-1].rollout.finish_reason,
        objective=objective,
    )


def _joined(scores: Sequence[TeacherScores]) -> TeacherScores:
    """Join the scores of several turns. The version is the oldest."""
    if len(scores) == 1:
        return scores[0]
    return TeacherScores(
        np.concatenate([s.ids for s in scores]),
        np.concatenate([s.logprobs for s in scores]),
        np.concatenate([s.sampled for s in scores]),
        min(s.version for s in scores),
    )
