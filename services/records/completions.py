"""The figures of a step's completions: what detectors compare with the start of the stage.

They are of the completions that the student sampled and that are trained on: with an environment, of each reply.
"""

from dataclasses import dataclass, field

from sdft.services.records.figures import COLOURS, Curve, figure


@dataclass(frozen=True, kw_only=True)
class CompletionFigures:
    """Lengths in tokens, the entropy in nats a token, shares from 0 to 1.

    None: the student sampled no completion in the step, or the file does not have the figure.
    """

    length_mean: float | None = field(
        default=None,
        metadata=figure(
            "Mean length of the last step's completions, in tokens",
            "completion_length_mean",
            curve=Curve("Length", "mean length", "Mean tokens of a completion.", COLOURS[0]),
        ),
    )
    length_tail: float | None = field(
        default=None,
        metadata=figure(
            "95th percentile of the lengths of the last step's completions, in tokens",
            "completion_length_tail",
            curve=Curve("Length, tail", "95th percentile of lengths", "95th percentile of the lengths.", COLOURS[0]),
        ),
    )
    truncated: float | None = field(
        default=None,
        metadata=figure(
            "Share of the last step's completions that reached the longest length",
            "truncated_share",
            curve=Curve("Truncated", "share truncated", "Share that reached the longest length.", COLOURS[1]),
        ),
    )
    empty: float | None = field(
        default=None,
        metadata=figure(
            "Share of the last step's completions without a token but the one that ends them",
            "empty_share",
            curve=Curve("Empty", "share empty", "Share without a token but the one that ends them.", COLOURS[1]),
        ),
    )
    repeated: float | None = field(
        default=None,
        metadata=figure(
            "Share of the last step's 3-grams that came before in the same completion",
            "repeated_share",
            curve=Curve("Repetition", "share repeated", "Share of 3-grams repeated in a completion.", COLOURS[2]),
        ),
    )
    distinct: float | None = field(
        default=None,
        metadata=figure(
            "Distinct 3-grams of all the last step's completions, over their 3-grams",
            "distinct_share",
            curve=Curve("Distinct", "distinct 3-grams", "Distinct 3-grams of a batch, over all.", COLOURS[2]),
        ),
    )
    entropy: float | None = field(
        default=None,
        metadata=figure(
            "Mean negative log-prob of the last step's sampled tokens by their sampler, nats per token",
            "entropy",
            curve=Curve("Entropy", "entropy", "Estimated from the sampled tokens, nats per token.", COLOURS[3]),
        ),
    )
    leaks: float | None = field(
        default=None,
        metadata=figure(
            "Share of the last step's completions with words that only the template of the teacher's prompt has",
            "leak_share",
            curve=Curve("Leaks", "share with words of the template", "Share with the template's words.", COLOURS[4]),
        ),
    )
    thoughts: float | None = field(
        default=None,
        metadata=figure(
            "Share of the last step's completions with a mark of reasoning",
            "thought_share",
            curve=Curve("Reasoning", "share with reasoning", "Share with a mark of reasoning.", COLOURS[4]),
        ),
    )
