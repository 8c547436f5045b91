"""Weights of the loss's rows: truncated importance weights, trainer over sampler, and weights of long completions."""

import torch
from torch import Tensor

from sdft.learner.config import LossConfig
from sdft.learner.loss.targets import Targets


def importance_weights(trainer: Tensor, targets: Targets, config: LossConfig) -> Tensor:
    """Return the truncated importance weight of every row, [N]: min(cap, exp(logp_trainer - logp_sampler)).

    It is per token, or its mean over the loss tokens of a sequence (the reference's form).
    """
    if config.importance.level == "off":
        return torch.ones_like(trainer)
    ratio = torch.exp(trainer - targets.sampler_logprobs).clamp(max=config.importance.cap)
    if config.importance.level == "token":
        return ratio
    count = int(targets.sequence.max()) + 1 if len(ratio) else 0
    total = ratio.new_zeros(count).index_add_(0, targets.sequence, ratio)
    rows = ratio.new_zeros(count).index_add_(0, targets.sequence, torch.ones_like(ratio))
    return (total / rows.clamp(min=1))[targets.sequence]


def length_weights(completion: Tensor, length: int) -> Tensor:
    """Return the weight of every row by the tokens [N] that its sequence completes: min(1, length / tokens), [N]."""
    return (length / completion).clamp(max=1)
