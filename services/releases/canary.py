"""The canary: a candidate that passed the gate answers a share of the users before it answers all.

An answer with feedback is good or bad. Of the answers since the canary began, g_s were good and b_s bad of the served
release, g_c and b_c of the canary. With uniform priors the shares of good answers have the posteriors
Beta(g_s + 1, b_s + 1) and Beta(g_c + 1, b_c + 1), and `worse` is the probability that the canary's share is lower by
more than `max_drop`.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from sdft.services.config.service import CanaryConfig, GateConfig
from sdft.services.releases.gate import Verdict

POINTS = 4000


@dataclass(frozen=True)
class Opinions:
    """Answers with feedback."""

    good: int = 0
    bad: int = 0

    @property
    def count(self) -> int:
        return self.good + self.bad

    def __str__(self) -> str:
        return f"{self.good} of {self.count} good"


def is_chosen(release: int, user: str, share: float) -> bool:
    """Return whether a canary answers a user: always the same for one canary, other users for the next one."""
    digest = hashlib.sha256(f"{release}/{user}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < share


def worse(served: Opinions, canary: Opinions, max_drop: float) -> float:
    """Return the probability that the canary's share of good answers is lower by more than `max_drop`."""
    x = (np.arange(POINTS) + 0.5) / POINTS
    of_canary, of_served = _density(canary, x), _density(served, x)
    # P(served > x + max_drop), from the density's sum above that point
    above = np.interp(x + max_drop, x, np.cumsum(of_served[::-1])[::-1], right=0.0)
    return float((of_canary * above).sum())


def decide_canary(
    gate: GateConfig, canary: CanaryConfig, served: Opinions, of_canary: Opinions, age_s: float
) -> tuple[Verdict, str] | None:
    """Return what becomes of the canary, and why; None while there is too little feedback.

    age_s: since it began.
    """
    chance = worse(served, of_canary, gate.max_drop)
    text = f"canary {of_canary}, served release {served}: worse with probability {chance:.3f}"
    enough = min(served.count, of_canary.count) >= canary.min_feedback
    if not enough and age_s < canary.max_wait_s:
        return None
    # Feedback is looked at again and again, so chance alone may lead: a canary is refused if it is all but certain.
    if chance > max(gate.refuse_above, 1 - gate.promote_below) and enough:
        return "refuse", text
    if chance < gate.promote_below and enough:
        return "promote", text
    missing = "" if enough else f" ({canary.min_feedback} of each are wanted, and the time is over)"
    return ("hold", text + missing) if not enough or age_s >= canary.max_wait_s else None


def _density(opinions: Opinions, x: np.ndarray) -> np.ndarray:
    """Return the posterior on the points x, with the sum 1."""
    a, b = opinions.good + 1, opinions.bad + 1
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    density = np.exp((a - 1) * np.log(x) + (b - 1) * np.log1p(-x) - log_beta)
    return np.asarray(density / density.sum())
