"""Training sequences: turns become tokens, a mask, spans and teacher rows at the tokens in the loss."""

import numpy as np
import pytest

from sdft.actors.shared.sequences import Span, Turn, sequence_of
from sdft.actors.shared.types import Rollout, SampleId, TeacherScores

SAMPLE = SampleId(0, 0, 0, 0)


def turn(context: list[int], completion: list[int], version: int, k: int = 2) -> Turn:
    ids, n = np.array(completion, np.int32), len(completion)
    rollout = Rollout(ids[:0], ids, -np.arange(n, dtype=np.float32), ((version, 0, n),), "stop")
    scores = TeacherScores(np.stack([ids] * k, 1), np.zeros((n, k), np.float32), ids.astype(np.float32), version)
    return Turn(np.array(context, np.int32), rollout, scores)


def test_two_turns_are_one_sequence_with_a_mask_of_its_own() -> None:
    two = sequence_of(SAMPLE, 7, [turn([1, 2], [3, 4, 5], 8), turn([6], [9, 9], 6)], skip_first=1)
    assert two.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 9, 9]
    assert two.loss_mask.tolist() == [False, False, False, True, True, False, False, True]
    assert two.spans == (Span(8, 2, 5), Span(6, 6, 8))
    assert np.isnan(two.logprobs[[0, 1, 5]]).all()
    assert two.logprobs[[2, 3, 4, 6, 7]].tolist() == [0, -1, -2, 0, -1]
    assert two.teacher is not None
    assert two.teacher.sampled.tolist() == [4, 5, 9]
    assert (two.teacher.version, two.seed, two.sampled_tokens, two.loss_tokens) == (6, 7, 5, 3)
    assert (two.prompt_ids.tolist(), [c.tolist() for c in two.completions]) == ([1, 2], [[3, 4, 5], [9, 9]])


def test_any_token_of_a_completion_may_be_left_out() -> None:
    given = turn([1], [2, 3, 4], 0)
    masked = Turn(given.context_ids, given.rollout, given.scores, np.array([True, False, True]))
    one = sequence_of(SAMPLE, 0, [masked])
    assert one.loss_mask.tolist() == [False, True, False, True]
    assert one.teacher is not None
    assert one.teacher.ids[:, 0].tolist() == [2, 4]


def test_weights_that_change_within_a_completion_are_spans_of_one_completion() -> None:
    ids = np.arange(4, dtype=np.int32)
    rollout = Rollout(ids[:0], ids, ids.astype(np.float32), ((1, 0, 3), (2, 3, 4)), "length")
    one = sequence_of(SAMPLE, 0, [Turn(ids[:2], rollout)])
    assert one.spans == (Span(1, 2, 5), Span(2, 5, 6))
    assert [c.tolist() for c in one.completions] == [[0, 1, 2, 3]]
    assert one.teacher is None


def test_scores_of_some_turns_only_are_an_error() -> None:
    scored, unscored = turn([1], [2], 0), turn([3], [4], 0)
    with pytest.raises(ValueError, match="1 of 2 turns have scores"):
        sequence_of(SAMPLE, 0, [scored, Turn(unscored.context_ids, unscored.rollout)])
