"""Drafts of training sequences: what the controller holds of a batch.

    student engine ─► completion ┐   tokens and log-probs stay in Ray's object store,
    teacher engine ─► scores     ┤   on the node where they were made
                                 └─► draft: references, lengths, weight versions ─► a learner rank joins the values

An algorithm makes drafts. The size of a draft does not depend on the number of sampled tokens. The driver makes
thousands of them in a step, and a frozen dataclass takes two to three times as long to make: the parts of a draft are
named tuples, and a draft is a dataclass that is not frozen. Nothing changes one; `dataclasses.replace` makes another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sdft.actors.shared.sequences import BoolArray, Span, TrainingSequence, joined_experts
from sdft.actors.shared.types import ExpertArray, FloatArray, IntArray, Rollout, SampleId, TeacherScores


class CompletionLost(Exception):
    """A completion or its scores were lost with the engine or the node that held them."""


class Completion(NamedTuple):
    """A completion whose tokens stay where they were made."""

    rollout: Any  # Rollout, or Ray's reference to it
    tokens: int
    versions: tuple[tuple[int, int, int], ...]  # as in Rollout
    finish_reason: str
    by_student: bool = True  # False: the student did not sample it, so its log-probs are not used

    @classmethod
    def of(cls, rollout: Rollout, reference: Any = None) -> "Completion":
        """Describe a rollout. reference: Ray's reference to it; None: the rollout itself is held."""
        held = rollout if reference is None else reference
        return cls(held, len(rollout.completion_ids), rollout.versions, rollout.finish_reason)

    def not_by_student(self, step: int) -> "Completion":
        """Return it as tokens that the student did not sample. step: the optimizer step that trains on it.

        It counts as sampled with the weights of the step before.
        """
        return self._replace(versions=((step - 1, 0, self.tokens),), by_student=False)


def given(step: int, completion_ids: IntArray, likely: IntArray | None = None) -> Completion:
    """Return tokens that no engine sampled, such as a demonstration, as a completion that the student did not sample.

    step: the optimizer step that trains on it. likely: as in Rollout.
    """
    unknown = np.full(len(completion_ids), np.nan, np.float32)
    rollout = Rollout(completion_ids[:0], completion_ids, unknown, (), "stop", likely=likely)
    return Completion.of(rollout).not_by_student(step)


class Scores(NamedTuple):
    """The teacher's scores of a completion, which stay where they were made."""

    scores: Any  # TeacherScores with one row per completion token, or Ray's reference to it
    version: int
    first: int = 0  # row of the completion's first token, if the scores are of more than this completion


class Turn(NamedTuple):
    """A completion, what precedes it since the turn before, and the teacher's scores of it."""

    context_ids: IntArray  # [C], not in the loss
    completion: Completion
    scores: Scores | None = None
    mask: BoolArray | None = None  # [T], completion tokens in the loss; None: all


@dataclass(slots=True)
class Draft:
    """A training sequence whose completions and scores stay where they were made."""

    sample: SampleId
    seed: int
    turns: tuple[Turn, ...]  # either all have scores, or none has
    skip_first: int = 0  # tokens at the start of each completion that are left out of the loss
    objective: int = 0

    def __post_init__(self) -> None:
        if len(self.turns) > 1 and len({turn.scores is None for turn in self.turns}) > 1:
            scored = sum(turn.scores is not None for turn in self.turns)
            raise ValueError(
                f"sample {self.sample}: {scored} of {len(self.turns)} turns have scores; give all of them, or none"
            )

    def __len__(self) -> int:
        count = 0
        for turn in self.turns:
            count += len(turn.context_ids) + turn.completion.tokens
        return count

    @property
    def spans(self) -> tuple[Span, ...]:
        """As in TrainingSequence."""
        found, offset = [], 0
        for turn in self.turns:
            offset += len(turn.context_ids)
            found += [Span(version, offset + start, offset + end) for version, start, end in turn.completion.versions]
            offset += turn.completion.tokens
        return tuple(found)

    @property
    def oldest_version(self) -> int:
        """Weight version of the first sampled token."""
        return self.turns[0].completion.versions[0][0]

    @property
    def newest_version(self) -> int:
        """Weight version of the last sampled token."""
        return self.turns[-1].completion.versions[-1][0]

    @property
    def sampled_tokens(self) -> int:
        """As in TrainingSequence."""
        count = 0  # a loop: the driver asks for it three times a sample, and `sum` takes twice as long for one turn
        for turn in self.turns:
            count += turn.completion.tokens
        return count

    @property
    def loss_tokens(self) -> int:
        """As in TrainingSequence."""
        return sum(map(self._loss_tokens, self.turns))

    @property
    def student_loss_tokens(self) -> int:
        """As in TrainingSequence."""
        return sum(self._loss_tokens(turn) for turn in self.turns if turn.completion.by_student)

    def _loss_tokens(self, turn: Turn) -> int:
        if turn.mask is None:
            return max(0, turn.completion.tokens - self.skip_first)
        return int(turn.mask[self.skip_first :].sum())

    @property
    def teacher_version(self) -> int | None:
        """As in TrainingSequence."""
        oldest = None
        for turn in self.turns:
            if turn.scores is not None and (oldest is None or turn.scores.version < oldest):
                oldest = turn.scores.version
        return oldest

    @property
    def masks(self) -> list[BoolArray]:
        """Which tokens of each completion are in the loss: [T] for each turn."""
        masks = []
        for turn in self.turns:
            mask = np.ones(turn.completion.tokens, dtype=np.bool_) if turn.mask is None else turn.mask.copy()
            mask[: self.skip_first] = False
            masks.append(mask)
        return masks

    @property
    def references(self) -> list[Any]:
        """What `joined` needs the values of: the rollout and the scores, if any, of each turn."""
        return [
            held
            for turn in self.turns
            for held in (turn.completion.rollout, *(() if turn.scores is None else (turn.scores.scores,)))
        ]


def joined(draft: Draft, values: Sequence[Any]) -> TrainingSequence:
    """Join a draft and the values of its references, in their order, to a training sequence."""
    ids: list[IntArray] = []
    masks: list[BoolArray] = []
    logprobs: list[FloatArray] = []
    scores: list[TeacherScores] = []
    experts: list[ExpertArray | int] = []  # of each context and completion; its length if they are not known
    remaining = iter(values)
    for turn, mask in zip(draft.turns, draft.masks, strict=True):
        context, rollout = turn.context_ids, next(remaining)
        own = rollout.logprobs if turn.completion.by_student else np.full(len(mask), np.nan, np.float32)
        ids += [context, rollout.completion_ids]
        masks += [np.zeros(len(context), dtype=np.bool_), mask]
        logprobs += [np.full(len(context), np.nan, dtype=np.float32), own]
        experts += _experts_of(context, rollout, turn.completion.by_student)
        if turn.scores is not None:
            s, rows = next(remaining), turn.scores.first + np.flatnonzero(mask)
            scores.append(TeacherScores(s.ids[rows], s.logprobs[rows], s.sampled[rows], s.version))
    return TrainingSequence(
        sample=draft.sample,
        token_ids=np.concatenate(ids),
        loss_mask=np.concatenate(masks),
        logprobs=np.concatenate(logprobs),
        spans=draft.spans,
        teacher=_in_a_row(scores) if scores else None,
        seed=draft.seed,
        finish_reason=draft.turns[-1].completion.finish_reason,
        objective=draft.objective,
        experts=joined_experts(experts),
    )


def _experts_of(context: IntArray, rollout: Rollout, by_student: bool) -> list[ExpertArray | int]:
    """Return the experts of a turn's context and of its completion, or the length of each if they are not known.

    Those of the context are known if the completion was sampled behind it.
    """
    c, t = len(context), len(rollout.completion_ids)
    if rollout.experts is None or not by_student:
        return [c, t]
    behind = np.array_equal(rollout.prompt_ids[len(rollout.prompt_ids) - c :], context)
    before = len(rollout.experts) - t
    return [rollout.experts[before - c : before] if behind else c, rollout.experts[before:]]


def _in_a_row(scores: Sequence[TeacherScores]) -> TeacherScores:
    """Join the scores of several turns. The version is the oldest."""
    if len(scores) == 1:
        return scores[0]
    return TeacherScores(
        np.concatenate([s.ids for s in scores]),
        np.concatenate([s.logprobs for s in scores]),
        np.concatenate([s.sampled for s in scores]),
        min(s.version for s in scores),
    )


def sequence_of(sample: SampleId, rollout: Rollout, scores: TeacherScores, skip_first: int = 0) -> TrainingSequence:
    """Make the training sequence of one scored rollout behind its prompt, for tests and benchmarks of the learner."""
    turn = Turn(rollout.prompt_ids, Completion.of(rollout), Scores(scores, scores.version))
    return joined(Draft(sample, 0, (turn,), skip_first), [rollout, scores])
