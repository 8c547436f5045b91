"""The figures of a step's completions, from its drafts and from what the learner's ranks counted."""

import math
from collections.abc import Sequence

from sdft.actors.shared.drafts import Completion, Draft
from sdft.learner.completions import CompletionCounts, Watched
from sdft.services.records.completions import CompletionFigures

TAIL = 0.95


def completion_figures(drafts: Sequence[Draft], counts: CompletionCounts, watched: Watched) -> CompletionFigures:
    """Return the figures of the completions that the student sampled.

    counts: over all ranks. watched: what they looked for.
    """
    own = [turn.completion for draft in drafts for turn in draft.turns if turn.completion.by_student]
    lengths, n = sorted(completion.tokens for completion in own), len(own)
    return CompletionFigures(
        length_mean=_per(sum(lengths), n),
        length_tail=float(lengths[math.ceil(TAIL * n) - 1]) if own else None,
        truncated=_per(sum(completion.finish_reason == "length" for completion in own), n),
        empty=_per(sum(map(_is_empty, own)), n),
        repeated=_per(counts.repeated, counts.grams),
        distinct=_per(min(counts.distinct, counts.grams), counts.grams),  # an estimate may exceed what it estimates
        entropy=_per(counts.nll, counts.tokens),
        leaks=_per(counts.leaking, counts.completions) if watched.template else None,
        thoughts=_per(counts.thinking, counts.completions),
    )


def _per(count: float, of: int) -> float | None:
    """Return a quotient; None if there is nothing to count."""
    return count / of if of else None


def _is_empty(completion: Completion) -> bool:
    """Whether a completion has no token, or only the one that ends it."""
    return completion.tokens == 0 or (completion.tokens == 1 and completion.finish_reason == "stop")
