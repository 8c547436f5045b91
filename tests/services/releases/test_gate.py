"""The gate: the probability of being worse, and what it decides."""

from dataclasses import replace

import numpy as np
import pytest

from sdft.services.config.service import GateConfig
from sdft.services.records.rows import Reply
from sdft.services.releases.collapse import repetitive
from sdft.services.releases.gate import compare, decide, worse

GATE = GateConfig()


@pytest.mark.parametrize(
    ("n", "lost", "gained", "drop"),
    [(69, 5, 1, 0.05), (80, 2, 60, 0.05), (16, 0, 0, 0.05), (6, 3, 0, 0.0), (200, 20, 12, 0.02), (1, 1, 0, 0.3)],
)
def test_worse_is_the_share_of_the_posterior(n: int, lost: int, gained: int, drop: float) -> None:
    samples = np.random.default_rng(0).dirichlet([lost + 1, gained + 1, n - lost - gained + 1], 400_000)
    share = float((samples[:, 0] - samples[:, 1] > drop).mean())
    assert worse(n, lost, gained, drop) == pytest.approx(share, abs=4e-3)


def test_worse_without_a_margin_is_the_sign_test() -> None:
    # P(p_b > p_c) depends on the changed answers alone: P(Bin(b + c + 1, 1/2) <= b).
    assert worse(500, 2, 5, 0.0) == pytest.approx(sum([1, 8, 28]) / 2**8, abs=1e-6)
    assert worse(500, 3, 3, 0.0) == pytest.approx(0.5, abs=1e-6)


def replies(step: int, right: list[int], texts: list[str] | None = None, name: str = "set", n: int = 40) -> list[Reply]:
    return [
        Reply(step, name, f"q{i}", "?", "!", texts[i % len(texts)] if texts else f"answer {i}", i in right, 3, False)
        for i in range(n)
    ]


def verdict(before: list[Reply], now: list[Reply], gate: GateConfig = GATE) -> str:
    return decide(compare(before, now, gate), gate).verdict


def test_a_better_model_passes_and_a_worse_one_does_not() -> None:
    before = replies(0, list(range(10)))
    assert verdict(before, replies(9, list(range(30)))) == "promote"
    assert verdict(before, replies(9, list(range(10)))) == "promote"  # the same answers
    assert verdict(before, replies(9, [])) == "refuse"


def test_one_bad_set_outweighs_good_ones() -> None:
    before = replies(0, [], name="new") + replies(0, list(range(40)), name="kept")
    now = replies(9, list(range(40)), name="new") + replies(9, list(range(30)), name="kept")
    decision = decide(compare(before, now, GATE), GATE)
    assert decision.verdict == "refuse"
    assert "kept 100.0 % -> 75.0 % (n 40, lost 10, gained 0)" in decision.reason
    assert "new" not in decision.reason


def test_too_few_questions_are_held() -> None:
    assert verdict(replies(0, [0], n=4), replies(9, [0], n=4)) == "hold"
    assert decide([], GATE).verdict == "hold"


def test_a_pass_by_hand_is_held() -> None:
    same = replies(0, [0]), replies(9, [0])
    assert verdict(*same, GateConfig(promotion="by_hand")) == "hold"


def test_a_small_set_decides_only_what_is_all_but_certain() -> None:
    large = replies(0, list(range(40)), name="large"), replies(9, list(range(40)), name="large")
    six = list(range(6))
    for right, said in ((six, "promote"), (six[:5], "promote"), ([], "refuse")):
        small = replies(0, six, name="small", n=6), replies(9, right, name="small", n=6)
        assert verdict(large[0] + small[0], large[1] + small[1]) == said


@pytest.mark.parametrize("texts", [[""], ["yes " * 9], ["a\n", "no " * 12]])
def test_signs_of_collapse_are_refused(texts: list[str]) -> None:
    everything = list(range(40))
    assert verdict(replies(0, everything), replies(9, everything, texts)) == "refuse"


def spoken(step: int, tokens: int, entropy: float | None = 0.5, n: int = 40) -> list[Reply]:
    """Right answers to a set that is not trained on, all of one length."""
    return [replace(r, tokens=tokens, entropy=entropy) for r in replies(step, list(range(n)), name="kept", n=n)]


@pytest.mark.parametrize(
    ("tokens", "entropy", "gate", "why"),
    [
        (31, 0.5, GATE, "kept: the mean length of answers, in tokens, rose from 10 to 31: a factor of 3 is allowed"),
        (3, 0.5, GATE, "kept: the mean length of answers, in tokens, fell from 10 to 3: a factor of 3 is allowed"),
        (10, 2.1, GATE, "the entropy of answers, in nats a token, rose from 0.5 to 2.1: a factor of 4 is allowed"),
        (10, 0.1, GATE, "the entropy of answers, in nats a token, fell from 0.5 to 0.1: a factor of 4 is allowed"),
        (30, 1.9, GATE, None),
        (10, None, GATE, None),
        (90, 9.0, GateConfig(length=None, entropy=None), None),
    ],
)
def test_answers_of_another_length_or_entropy_are_refused(
    tokens: int, entropy: float | None, gate: GateConfig, why: str | None
) -> None:
    decision = decide(compare(spoken(0, 10), spoken(9, tokens, entropy), gate, kept={"kept"}), gate)
    assert decision.verdict == ("promote" if why is None else "refuse")
    assert (why or "") in decision.reason


def test_length_and_entropy_of_what_is_trained_and_of_few_answers_may_change() -> None:
    assert decide(compare(spoken(0, 10), spoken(9, 90, 9.0), GATE), GATE).verdict == "promote"
    few = compare(spoken(0, 10, n=4), spoken(9, 90, 9.0, n=4), GATE, kept={"kept"})
    large = compare(replies(0, []), replies(9, []), GATE)
    assert decide(large + few, GATE).verdict == "promote"


def test_other_questions_are_an_error() -> None:
    with pytest.raises(ValueError, match="same questions"):
        compare(replies(0, [], n=3), replies(1, [], n=4), GATE)


@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        ("the " * 8, True),
        ("It is. " * 5, True),
        ("I do not know what you mean by that, so I say it again. " * 5, True),
        ("Yes.", False),
        ("1. a\n2. b\n3. c\n4. d", False),
        ("", False),
        ("-----------------------------------", False),
        ("He had had had had a dog", False),
        ('{"a": {"b": {"c": {"d": 1}}}}', False),
        ("The price is 1000000000000000000000000000", False),
        ("| a | b |\n|---|---|---|---|---|---|---|", False),
        ("no no no no", False),
    ],
)
def test_repetition(text: str, is_it: bool) -> None:
    assert repetitive(text) == is_it


def test_false_refusals_of_an_equal_model_are_few() -> None:
    """Two samples of one model with accuracy 0.8, of which a tenth of the answers differ by chance."""
    refused = promoted = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        first = random.random(100) < 0.8
        second = np.where(random.random(100) < 0.1, random.random(100) < 0.8, first)
        made = verdict(replies(0, list(np.flatnonzero(first)), n=100), replies(9, list(np.flatnonzero(second)), n=100))
        refused, promoted = refused + (made == "refuse"), promoted + (made == "promote")
    assert refused <= 4
    assert promoted >= 160
