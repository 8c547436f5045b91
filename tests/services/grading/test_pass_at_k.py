"""pass@k compared with its definition."""

from itertools import combinations

import pytest

from sdft.services.grading.pass_at_k import pass_at_k


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_of_k_replies_with_a_right_one(n: int) -> None:
    for right in range(n + 1):
        answers = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            draws = [any(draw) for draw in combinations(answers, k)]
            assert pass_at_k(n, right, k) == pytest.approx(sum(draws) / len(draws))


def test_many_answers_do_not_overflow() -> None:
    assert pass_at_k(256, 1, 128) == pytest.approx(0.5)
    assert pass_at_k(256, 0, 128) == 0.0


def test_more_answers_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="pass@5 is not defined for 1 right replies among 4"):
        pass_at_k(4, 1, 5)
