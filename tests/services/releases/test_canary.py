"""What the feedback to a canary decides, and which users a canary answers."""

import numpy as np
import pytest

from sdft.services.config.service import CanaryConfig, GateConfig
from sdft.services.releases.canary import Opinions, decide_canary, is_chosen, worse

CANARY = CanaryConfig(share=0.2, min_feedback=20, max_wait_s=100)


@pytest.mark.parametrize(
    ("served", "canary"), [((9, 3), (2, 8)), ((0, 0), (0, 0)), ((30, 10), (31, 9)), ((1, 0), (0, 40))]
)
def test_the_probability_is_that_of_draws_from_the_posteriors(served: tuple[int, int], canary: tuple[int, int]) -> None:
    draws = np.random.default_rng(0)
    of_served, of_canary = (draws.beta(good + 1, bad + 1, 400_000) for good, bad in (served, canary))
    expected = float((of_canary < of_served - 0.05).mean())
    assert worse(Opinions(*served), Opinions(*canary), 0.05) == pytest.approx(expected, abs=4e-3)


@pytest.mark.parametrize(
    ("served", "canary", "age_s", "verdict"),
    [
        ((18, 2), (19, 1), 10, "promote"),
        ((18, 2), (4, 16), 10, "refuse"),
        ((18, 2), (9, 1), 10, None),  # ten are too few
        ((9, 1), (18, 2), 10, None),
        ((9, 1), (9, 1), 101, "hold"),
        ((18, 2), (17, 3), 10, None),  # neither clear
        ((18, 2), (15, 5), 10, None),  # worse with probability 0.75: chance may do that
        ((18, 2), (17, 3), 101, "hold"),
        ((0, 9), (0, 9), 101, "hold"),
    ],
)
def test_feedback_decides(served: tuple[int, int], canary: tuple[int, int], age_s: float, verdict: str | None) -> None:
    found = decide_canary(GateConfig(), CANARY, Opinions(*served), Opinions(*canary), age_s)
    assert (found and found[0]) == verdict
    if found is not None:
        good, bad = canary
        assert found[1].startswith(f"canary {good} of {good + bad} good, served release ")


def test_a_share_of_the_users_is_chosen_and_other_users_the_next_time() -> None:
    first, second = ([is_chosen(release, f"user-{i}", 0.2) for i in range(2000)] for release in (2, 3))
    assert 340 < sum(first) < 460
    assert first == [is_chosen(2, f"user-{i}", 0.2) for i in range(2000)]
    assert sum(a and b for a, b in zip(first, second, strict=True)) < 160
