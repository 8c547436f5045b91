"""The gate: whether a candidate may be served in place of the release that is, from the same questions to both.

Of n questions, b were right before and are wrong now, c the other way round. With a uniform prior on the three shares
(p_b, p_c, p_rest), they have the posterior Dirichlet(b + 1, c + 1, n - b - c + 1). The drop of the accuracy is
p_b - p_c, and `worse` is the probability that it exceeds `max_drop`:

    p_b + p_c = s ~ Beta(b + c + 2, n - b - c + 1),   p_b / s = r ~ Beta(b + 1, c + 1)   (independent)
    P(s (2 r - 1) > d) = integral over s of P(r > (1 + d / s) / 2)
    P(r > t) = P(Binomial(b + c + 1, t) <= b)

A set is also refused if the share of empty, truncated or repetitive answers rises: signs of a model that collapses.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sdft.services.config.service import GateConfig
from sdft.services.records.rows import Reply

Verdict = Literal["promote", "hold", "refuse"]
POINTS = 4000  # of the integral, which is then exact to 1e-6
REPEATED, PERIOD = 4, 40  # an answer that ends in so many copies of at most PERIOD characters is repetitive


@dataclass(frozen=True)
class SetResult:
    """One set: `before` and `now` are accuracies; lost and gained: questions right only before, or only now."""

    name: str
    n: int
    before: float
    now: float
    lost: int
    gained: int
    worse: float  # probability that the accuracy fell by more than max_drop
    rises: dict[str, float]  # of the shares of empty, truncated and repetitive answers

    @property
    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    reason: str
    sets: list[SetResult]


def worse(n: int, lost: int, gained: int, max_drop: float) -> float:
    """Return the probability that the accuracy on n questions fell by more than `max_drop`."""
    changed = lost + gained
    a, b = changed + 2, n - changed + 1
    s = (np.arange(POINTS) + 0.5) / POINTS
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    density = np.exp((a - 1) * np.log(s) + (b - 1) * np.log1p(-s) - log_beta)
    t = (1 + max_drop / s) / 2
    inside = t < 1
    return float((density[inside] * _at_most(lost, changed + 1, t[inside])).sum() / density.sum())


def _at_most(k: int, n: int, p: np.ndarray) -> np.ndarray:
    """Return P(Binomial(n, p) <= k), for each p in (0, 1)."""
    terms = [
        np.exp(
            math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * np.log(p) + (n - i) * np.log1p(-p)
        )
        for i in range(k + 1)
    ]
    return np.sum(terms, axis=0)


def repetitive(text: str) -> bool:
    """Return whether a text ends in several copies of the same few characters."""
    end = text.rstrip()[-REPEATED * PERIOD :]
    return any(
        len(end) >= REPEATED * size and end.endswith(end[-size:] * REPEATED) and end[-size:].strip(" .-=_*#") != ""
        for size in range(1, PERIOD + 1)
    )


def compare(before: Sequence[Reply], now: Sequence[Reply], max_drop: float) -> list[SetResult]:
    """Compare the replies of two models to the same questions, set by set. Raises ValueError if they differ."""
    asked = {(r.task, r.id): r for r in before}
    if asked.keys() != {(r.task, r.id) for r in now}:
        raise ValueError("the two models were not asked the same questions")
    results = []
    for name in dict.fromkeys(r.task for r in now):
        pairs = [(asked[r.task, r.id], r) for r in now if r.task == name]
        lost = sum(old.correct and not new.correct for old, new in pairs)
        gained = sum(new.correct and not old.correct for old, new in pairs)
        n = len(pairs)
        olds, news = [old for old, _ in pairs], [new for _, new in pairs]
        results.append(
            SetResult(
                name=name,
                n=n,
                before=sum(r.correct for r in olds) / n,
                now=sum(r.correct for r in news) / n,
                lost=lost,
                gained=gained,
                worse=worse(n, lost, gained, max_drop),
                rises={sign: _share(news, sign) - _share(olds, sign) for sign in ("empty", "truncated", "repetitive")},
            )
        )
    return results


def _share(replies: Sequence[Reply], sign: str) -> float:
    signs = {
        "empty": lambda r: not r.text.strip(),
        "truncated": lambda r: bool(r.truncated),
        "repetitive": lambda r: repetitive(r.text),
    }
    return sum(map(signs[sign], replies)) / len(replies)


def decide(results: Sequence[SetResult], gate: GateConfig) -> Decision:
    """Decide from the sets. Without any set nothing is known, and the candidate is held."""
    if not results:
        return Decision("hold", "there is no evaluation set, so nothing is known of the candidate", [])
    collapsed = [
        f"{r.name}: {sign} answers rose by {100 * rise:.0f} points"
        for r in results
        for sign, rise in r.rises.items()
        if rise > gate.max_rise
    ]
    lost = [r for r in results if r.worse > gate.refuse_above]
    if collapsed or lost:
        return Decision("refuse", "; ".join([*map(_sentence, lost), *collapsed]), list(results))
    unsure = [r for r in results if r.worse >= gate.promote_below]
    if unsure:
        return Decision("hold", "; ".join(map(_sentence, unsure)), list(results))
    if gate.promotion == "by_hand":
        return Decision("hold", "it passes, and gate.promotion is by_hand", list(results))
    return Decision("promote", "; ".join(map(_sentence, results)), list(results))


def _sentence(r: SetResult) -> str:
    return (
        f"{r.name} {100 * r.before:.1f} % -> {100 * r.now:.1f} % (n {r.n}, lost {r.lost}, gained {r.gained}): worse "
        f"with probability {r.worse:.3f}"
    )
