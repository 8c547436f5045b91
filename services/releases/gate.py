"""The gate: whether a candidate may be served in place of the release that is, from the same questions to both.

Of n questions, b were right before and are wrong now, c the other way round. With a uniform prior on the three shares
(p_b, p_c, p_rest), they have the posterior Dirichlet(b + 1, c + 1, n - b - c + 1). The drop of the accuracy is
p_b - p_c, and `worse` is the probability that it exceeds `max_drop`:

    p_b + p_c = s ~ Beta(b + c + 2, n - b - c + 1),   p_b / s = r ~ Beta(b + 1, c + 1)   (independent)
    P(s (2 r - 1) > d) = integral over s of P(r > (1 + d / s) / 2)
    P(r > t) = P(Binomial(b + c + 1, t) <= b)

The same is computed for signs of a model that collapses: empty, truncated and repetitive answers, whose share must not
rise by more than `max_rise`. Length and entropy of the answers to a set that is not trained on must not move by more
than a factor. A set with so few questions that equal answers leave a doubt decides nothing, unless it is all but
certain that it is worse.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from sdft.services.config.service import GateConfig
from sdft.services.records.rows import Reply
from sdft.services.releases.collapse import SIGNS, drifts, has

Verdict = Literal["promote", "hold", "refuse"]
POINTS = 4000  # of the integral, which is then exact to 1e-6


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
    equal: float  # the same, if no answer had changed
    signs: dict[str, float]  # for each sign of collapse, the probability that its share rose by more than max_rise
    shares: dict[str, float]  # of the answers with each sign, now
    drifts: list[str] = field(default_factory=list)  # figures of the answers that have moved too far

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


def compare(
    before: Sequence[Reply], now: Sequence[Reply], gate: GateConfig, kept: Collection[str] = ()
) -> list[SetResult]:
    """Compare the replies of two models to the same questions, set by set. Raises ValueError if they differ.

    kept: names of the sets that are not trained on.
    """
    asked = {(r.task, r.id): r for r in before}
    if asked.keys() != {(r.task, r.id) for r in now}:
        raise ValueError("the two models were not asked the same questions")
    results = []
    for name in dict.fromkeys(r.task for r in now):
        pairs = [(asked[r.task, r.id], r) for r in now if r.task == name]
        n = len(pairs)
        gained, lost = _changes([(old.correct, new.correct) for old, new in pairs])
        signs = {}
        for sign in SIGNS:
            more, fewer = _changes([(has(old, sign), has(new, sign)) for old, new in pairs])
            signs[sign] = worse(n, more, fewer, gate.max_rise)
        results.append(
            SetResult(
                name=name,
                n=n,
                before=sum(old.correct for old, _ in pairs) / n,
                now=sum(new.correct for _, new in pairs) / n,
                lost=lost,
                gained=gained,
                worse=worse(n, lost, gained, gate.max_drop),
                equal=worse(n, 0, 0, gate.max_drop),
                signs=signs,
                shares={sign: sum(has(new, sign) for _, new in pairs) / n for sign in SIGNS},
                drifts=drifts([old for old, _ in pairs], [new for _, new in pairs], gate) if name in kept else [],
            )
        )
    return results


def judged(replies: Sequence[Reply], gate: GateConfig, kept: Collection[str]) -> Decision:
    """Decide from the replies of a window's run: those before its first step and those after its last.

    kept: as in compare. Raises ValueError if the two are not replies to the same questions.
    """
    last = max((r.step for r in replies), default=0)
    before, now = ([r for r in replies if r.step == step] for step in (0, last))
    return decide(compare(before, now, gate, kept), gate)


def _changes(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int]:
    """Return how many became true, and how many false."""
    return sum(new and not old for old, new in pairs), sum(old and not new for old, new in pairs)


def decide(results: Sequence[SetResult], gate: GateConfig) -> Decision:
    """Decide from the sets. If none is large enough to decide, the candidate is held."""
    sets = list(results)
    bad = [_sentence(r) for r in sets if r.worse > _refused_above(r.equal, gate)]
    for r in sets:
        few = worse(r.n, 0, 0, gate.max_rise)
        bad += [
            f"{r.name}: {100 * r.shares[sign]:.0f} % {sign} answers, more than before with probability {chance:.3f}"
            for sign, chance in r.signs.items()
            if chance > _refused_above(few, gate)
        ]
        bad += [f"{r.name}: {one}" for one in r.drifts if r.equal < gate.promote_below]
    if bad:
        return Decision("refuse", "; ".join(bad), sets)
    deciding = [r for r in sets if r.equal < gate.promote_below]
    if not deciding:
        asked = sum(r.n for r in sets)
        return Decision("hold", f"{asked} questions are too few to compare; add evaluation sets", sets)
    unsure = [r for r in deciding if r.worse >= gate.promote_below]
    if unsure:
        return Decision("hold", "; ".join(map(_sentence, unsure)), sets)
    if gate.promotion == "by_hand":
        return Decision("hold", "it passes, and gate.promotion is by_hand", sets)
    return Decision("promote", "; ".join(map(_sentence, sets)), sets)


def _refused_above(equal: float, gate: GateConfig) -> float:
    """Return the probability above which a set refuses a candidate. equal: that of equal answers."""
    return gate.refuse_above if equal < gate.promote_below else max(gate.refuse_above, 1 - gate.promote_below)


def _sentence(r: SetResult) -> str:
    return (
        f"{r.name} {100 * r.before:.1f} % -> {100 * r.now:.1f} % (n {r.n}, lost {r.lost}, gained {r.gained}): worse "
        f"with probability {r.worse:.3f}"
    )
