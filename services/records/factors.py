"""Figures that may move by a factor, up or down, and the sentence about one that has moved further."""

TOKEN, NATS = 1.0, 0.01  # a shorter length, and a smaller entropy or divergence, count as this: a factor is then finite


def times(before: float, now: float) -> float:
    """Return the factor between two figures, at least 1."""
    return max(now / before, before / now)


def moved_by(what: str, before: float, now: float, allowed: float, at: str = "") -> str:
    """Return the sentence, without a full stop. at: where, as in " at step 7"."""
    verb = "rose" if now > before else "fell"
    return f"{what} {verb} from {before:.3g} to {now:.3g}{at}: a factor of {allowed:g} is allowed"
