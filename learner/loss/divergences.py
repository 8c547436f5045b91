"""The formulas of the divergences between teacher and student over a support."""

import math

import torch
from torch import Tensor

from sdft.learner.config import LossConfig
from sdft.learner.gpu.operations import fused
from sdft.learner.loss.targets import Targets

OF_ONE_TOKEN = ("sampled", "nll", "dft")  # divergences that use only the sequence's own tokens


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 (Maechler 2012: expm1 near zero, log1p elsewhere)."""
    near = torch.log(-torch.expm1(torch.clamp(x, min=-0.6931)))
    far = torch.log1p(-torch.exp(torch.clamp(x, max=-0.6931)))
    return torch.where(x > -0.6931, near, far)


def floor_of(dtype: torch.dtype) -> float:
    """The least mass of a tail: below it, 1 - sum is rounding noise."""
    return 8 * torch.finfo(dtype).eps


def with_tail(logprobs: Tensor, vocabulary: int) -> Tensor:
    """Append log(1 - sum exp) as one more column, [N, K] -> [N, K + 1], unless K is the vocabulary."""
    if logprobs.shape[-1] >= vocabulary:
        return logprobs
    inside = torch.logsumexp(logprobs, -1).clamp(max=-floor_of(logprobs.dtype))
    return torch.cat([logprobs, log1mexp(inside)[:, None]], -1)


def divergence(log_p: Tensor, log_q: Tensor, config: LossConfig) -> Tensor:
    """Return the per-row divergence of two log-distributions over the same support: [N, S], [N, S] -> [N].

    Raises ValueError for a divergence that is not over a support.
    """
    kind = config.divergence
    if kind.type == "forward":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind.type == "reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind.type == "jsd":
        beta = torch.tensor(kind.beta, dtype=log_p.dtype, device=log_p.device)
        log_m = torch.logaddexp(log_p + torch.log1p(-beta), log_q + torch.log(beta))
        to_q = (log_q.exp() * (log_q - log_m)).sum(-1)
        to_p = (log_p.exp() * (log_p - log_m)).sum(-1)
        return beta * to_q + (1 - beta) * to_p
    raise ValueError(f"no divergence over a support is called {kind.type!r}")


def support(targets: Targets, config: LossConfig) -> Tensor:
    """Return the tokens whose log-probs the objective is a function of: [N, S] int64."""
    return targets.sampled_ids[:, None] if config.divergence.type in OF_ONE_TOKEN else targets.teacher_ids


def support_objective(log_p: Tensor, targets: Targets, vocabulary: int, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Return per row the objective to differentiate and the value to report: log_p of the support [N, S] -> [N], [N].

    Both are the same, with three exceptions. With a clip the objective is min(value, clip), which has no gradient
    beyond. For `sampled` the value is the log-ratio log p(y) - log q(y), and the objective is
    stop_gradient(log-ratio) * log p(y): the unbiased one-sample gradient of reverse KL (much noisier than a support).
    For `dft` the value is -log p(y), and the objective is the value times stop_gradient(p(y)).
    """
    kind = config.divergence.type
    if kind in ("nll", "dft"):
        value = -log_p[:, 0]
        return (value * value.detach().neg().exp() if kind == "dft" else value), value.detach()
    if kind == "sampled":
        ratio = log_p.detach()[:, 0] - targets.teacher_sampled
        return ratio * log_p[:, 0], ratio
    log_q = with_tail(targets.teacher_logprobs.to(log_p.dtype), vocabulary).detach()
    value = divergence(with_tail(log_p, vocabulary), log_q, config)
    return clipped(value, config), value.detach()


def gradient(
    log_p: Tensor, targets: Targets, scale: Tensor, vocabulary: int, config: LossConfig, is_fused: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the sum of the objectives times `scale` [N] in log_p [N, S], and the values [N].

    is_fused: by one kernel, for the divergences that have one.
    """
    kind = config.divergence.type
    if is_fused and kind in ("forward", "reverse"):
        log_q, reverse, tail = targets.teacher_logprobs, kind == "reverse", log_p.shape[1] < vocabulary
        limit = math.inf if config.clip is None else config.clip
        values, slope = fused.support(log_p.contiguous(), log_q, reverse, tail, floor_of(log_p.dtype), limit)
        return slope.mul_(scale[:, None]), values
    with torch.enable_grad():
        log_p = log_p.detach().requires_grad_()
        objective, values = support_objective(log_p, targets, vocabulary, config)
        (found,) = torch.autograd.grad((objective * scale).sum(), log_p)
    return found, values


def clipped(value: Tensor, config: LossConfig) -> Tensor:
    """Return min(value, clip) of each row; the values themselves without a clip."""
    return value if config.clip is None else value.clamp(max=config.clip)


def token_objective(logits: Tensor, targets: Targets, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Return objective and value from whole logits, [N, V] -> [N], [N]: the plain formula, for comparisons.

    Without the entropy.
    """
    log_p = logits.gather(-1, support(targets, config)) - torch.logsumexp(logits, -1, keepdim=True)
    return support_objective(log_p, targets, logits.shape[-1], config)
