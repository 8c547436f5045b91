"""Signs of a model that collapses, in its answers.

    of each answer   empty, truncated, repetitive
    of a set         the mean length of its answers, and their entropy: the mean negative log-prob of the tokens

A set that is not trained on has the same figures before and after. Of a set that is, they may well change.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from sdft.services.config.service import GateConfig
from sdft.services.records.factors import NATS, TOKEN, moved_by, times
from sdft.services.records.rows import Reply

REPEATED, PERIOD, SPAN = 4, 80, 24  # a repetitive answer ends in so many copies of at most PERIOD characters
SIGNS = ("empty", "truncated", "repetitive")


def has(reply: Reply, sign: str) -> bool:
    """Whether an answer has a sign of SIGNS."""
    if sign == "empty":
        return not reply.text.strip()
    return bool(reply.truncated) if sign == "truncated" else repetitive(reply.text)


def repetitive(text: str) -> bool:
    """Return whether a text ends in several copies of the same few words: at least SPAN characters, with a letter."""
    end = text.rstrip()[-REPEATED * PERIOD :]
    for size in range(1, PERIOD + 1):
        copies = max(REPEATED, -(-SPAN // size))
        piece = end[-size:]
        if any(map(str.isalpha, piece)) and len(end) >= copies * size and end.endswith(piece * copies):
            return True
    return False


def drifts(before: Sequence[Reply], now: Sequence[Reply], gate: GateConfig) -> list[str]:
    """Say which figures of a set's answers have moved too far. Replies without a figure do not count."""
    found = []
    for what, allowed, figure, least in (
        ("the mean length of answers, in tokens,", gate.length, "tokens", TOKEN),
        ("the entropy of answers, in nats a token,", gate.entropy, "entropy", NATS),
    ):
        values = [[v for r in replies if (v := getattr(r, figure)) is not None] for replies in (before, now)]
        if allowed is None or not all(values):
            continue
        old, new = (fmean(of_model) for of_model in values)
        if not math.isfinite(new) or times(max(old, least), max(new, least)) > allowed:
            found.append(moved_by(what, old, new, allowed))
    return found
