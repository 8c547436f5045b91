"""The counts of a batch's completions, against counting by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from sdft.actors.shared.drafts import Completion, Draft, Turn, given, joined
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import Rollout, SampleId
from sdft.learner.completions import GRAM, KEPT, CompletionCounts, Watched, counted, total

PROMPT = np.array([1, 2, 3], np.int32)


def completion(ids: Sequence[int], logprob: float = -0.5, reason: str = "stop") -> Completion:
    tokens = np.array(ids, np.int32)
    logprobs = np.full(len(ids), logprob, np.float32)
    return Completion.of(Rollout(PROMPT, tokens, logprobs, ((0, 0, len(ids)),), reason))


def sequence(*completions: Completion, context: Sequence[int] = (1, 2, 3)) -> TrainingSequence:
    turns = tuple(Turn(np.array(context, np.int32), c) for c in completions)
    return joined(Draft(SampleId(0, 0, 0, 0), 0, turns), [c.rollout for c in completions])


def test_ngrams_are_counted_within_a_completion_and_over_all() -> None:
    """5 6 7 comes twice in the first completion, and once more in the second."""
    found = counted([sequence(completion([5, 6, 7, 5, 6, 7])), sequence(completion([5, 6, 7, 8]))], Watched())
    assert (found.completions, found.tokens) == (2, 10)
    assert (found.grams, found.repeated, found.distinct) == (4 + 2, 1, 4.0)  # 567 675 756 | 678
    assert found.nll == pytest.approx(10 * 0.5)


def test_a_completion_shorter_than_an_ngram_has_none() -> None:
    found = counted([sequence(completion([5, 6])), sequence(completion([]))], Watched())
    assert (found.completions, found.tokens, found.grams, found.distinct) == (2, 2, 0, 0.0)


def test_turns_are_completions_of_their_own_and_their_contexts_are_not_counted() -> None:
    found = counted([sequence(completion([5, 6, 7]), completion([5, 6, 7]))], Watched(template=((1, 2, 3),)))
    assert (found.completions, found.tokens, found.grams, found.repeated, found.leaking) == (2, 6, 2, 0, 0)


def test_what_the_student_did_not_sample_is_not_counted() -> None:
    demonstration = given(1, np.array([5, 6, 7], np.int32))
    by_teacher = completion([5, 6, 7]).not_by_student(1)
    assert counted([sequence(demonstration), sequence(by_teacher)], Watched()) == CompletionCounts()


def test_completions_with_words_of_the_template_or_marks_are_counted_once() -> None:
    watched = Watched(template=((7, 8, 9, 10), (8, 9, 10, 11)), thoughts=((40,), (41, 42)))
    samples = [[7, 8, 9, 10, 11], [8, 9, 10, 12], [40, 5, 40], [5, 41, 42], [41, 5, 42]]
    found = counted([sequence(completion(ids)) for ids in samples], watched)
    assert (found.leaking, found.thinking) == (1, 2)


@pytest.mark.parametrize("words", [300, 30_000])
def test_the_counts_do_not_depend_on_the_ranks(words: int) -> None:
    """More distinct 3-grams than are kept are estimated, with the same number for any division over ranks."""
    chance = np.random.default_rng(0)
    samples = [sequence(completion(chance.integers(0, words, 400).tolist(), -0.25)) for _ in range(48)]
    whole = counted(samples, Watched())
    parts = [counted(samples[i::3], Watched()) for i in range(3)]
    assert total(parts) == whole
    assert total([whole]) == whole
    grams = {gram for s in samples for gram in _grams(s)}
    assert len(grams) > KEPT
    assert whole.distinct == pytest.approx(len(grams), rel=4 / math.sqrt(KEPT))  # four standard errors
    few = counted(samples[:5], Watched())
    assert few.distinct == len({gram for s in samples[:5] for gram in _grams(s)})


def _grams(s: TrainingSequence) -> set[tuple[int, ...]]:
    ids = s.completions[0].tolist()
    return {tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)}
