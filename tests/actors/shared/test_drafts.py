"""Drafts: turns become tokens, a mask, spans and teacher rows at the tokens in the loss."""

import numpy as np
import pytest

from sdft.actors.shared.drafts import Completion, Draft, Scores, Turn, given, joined
from sdft.actors.shared.sequences import Span, TrainingSequence
from sdft.actors.shared.types import Rollout, SampleId, TeacherScores

SAMPLE = SampleId(0, 0, 0, 0)


def turn(context: list[int], completion: list[int], version: int, mask: list[bool] | None = None) -> Turn:
    ids, n = np.array(completion, np.int32), len(completion)
    rollout = Rollout(ids[:0], ids, -np.arange(n, dtype=np.float32), ((version, 0, n),), "stop")
    scores = TeacherScores(np.stack([ids, ids], 1), np.zeros((n, 2), np.float32), ids.astype(np.float32), version)
    kept = None if mask is None else np.array(mask)
    return Turn(np.array(context, np.int32), Completion.of(rollout), Scores(scores, version), kept)


def sequence(draft: Draft) -> TrainingSequence:
    """Join a draft whose values are all here, and check that it describes the sequence."""
    made = joined(draft, draft.references)
    assert len(draft) == len(made)
    for name in ("spans", "sampled_tokens", "loss_tokens", "student_loss_tokens", "teacher_version"):
        assert getattr(draft, name) == getattr(made, name)
    return made


def test_two_turns_are_one_sequence_with_a_mask_of_its_own() -> None:
    two = sequence(Draft(SAMPLE, 7, (turn([1, 2], [3, 4, 5], 8), turn([6], [9, 9], 6)), skip_first=1))
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
    one = sequence(Draft(SAMPLE, 0, (turn([1], [2, 3, 4], 0, mask=[True, False, True]),)))
    assert one.loss_mask.tolist() == [False, True, False, True]
    assert one.teacher is not None
    assert one.teacher.ids[:, 0].tolist() == [2, 4]


def test_weights_that_change_within_a_completion_are_spans_of_one_completion() -> None:
    ids = np.arange(4, dtype=np.int32)
    rollout = Rollout(ids[:0], ids, ids.astype(np.float32), ((1, 0, 3), (2, 3, 4)), "length")
    one = sequence(Draft(SAMPLE, 0, (Turn(ids[:2], Completion.of(rollout)),)))
    assert one.spans == (Span(1, 2, 5), Span(2, 5, 6))
    assert [c.tolist() for c in one.completions] == [[0, 1, 2, 3]]
    assert (one.teacher, one.finish_reason) == (None, "length")


def test_tokens_that_the_student_did_not_sample_have_no_log_probs_and_the_version_of_the_step_before() -> None:
    scored = turn([1], [2, 3], 5)
    by_teacher = Turn(scored.context_ids, scored.completion.not_by_student(4), scored.scores)
    demonstration = Turn(scored.context_ids, given(4, np.array([2, 3], np.int32)))
    for one in (sequence(Draft(SAMPLE, 0, (t,))) for t in (by_teacher, demonstration)):
        assert np.isnan(one.logprobs).all()
        assert one.spans == (Span(3, 1, 3),)
        assert (one.loss_tokens, one.student_loss_tokens) == (2, 0)


def test_scores_of_some_turns_only_are_an_error() -> None:
    scored, other = turn([1], [2], 0), turn([3], [4], 0)
    with pytest.raises(ValueError, match="1 of 2 turns have scores"):
        Draft(SAMPLE, 0, (scored, Turn(other.context_ids, other.completion)))


def test_the_size_of_a_draft_by_reference_does_not_depend_on_its_tokens() -> None:
    import pickle

    def size(tokens: int) -> int:
        completion = Completion("a reference", tokens, ((1, 0, tokens),), "stop")
        return len(pickle.dumps(Draft(SAMPLE, 0, (Turn(np.zeros(9, np.int32), completion, Scores("another", 1)),))))

    assert size(100_000) - size(100) <= 8


def test_experts_of_a_completion_and_of_the_context_that_it_was_sampled_behind() -> None:
    """-1 where they are not known: behind another context, and where the student did not sample."""
    ids, prompt = np.array([5, 6, 7], np.int32), np.array([1, 2], np.int32)
    experts = np.arange(10, dtype=np.int16).reshape(5, 1, 2)
    rollout = Rollout(prompt, ids, np.zeros(3, np.float32), ((0, 0, 3),), "stop", experts)
    completion = Completion.of(rollout)
    own = sequence(Draft(SAMPLE, 0, (Turn(prompt, completion), Turn(prompt + 1, given(1, ids)))))
    assert own.experts is not None
    np.testing.assert_array_equal(own.experts[:5], experts)
    assert (own.experts[5:] == -1).all()
    other = sequence(Draft(SAMPLE, 0, (Turn(prompt + 1, completion),)))
    assert other.experts is not None
    assert (other.experts[:2] == -1).all()
    np.testing.assert_array_equal(other.experts[2:], experts[2:])
    assert sequence(Draft(SAMPLE, 0, (Turn(prompt, completion.not_by_student(1)),))).experts is None
