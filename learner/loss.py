"""The self-distillation divergence: teacher's top-K plus one tail bucket against the student, on the student's tokens.

Forward is KL(q||p), reverse is KL(p||q), for teacher q and student p; jsd mixes m = (1-beta) p + beta q. Cutting both
distributions to the teacher's K tokens and one bucket for the rest is a coarsening, so the divergence is a lower bound
of the full one and equals it for K = V. No gradient reaches the teacher or the importance weights.

Logits exist for one chunk of positions at a time: `divergence_loss` returns value and gradient without ever holding a
[tokens, vocabulary] array.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.config import LossConfig

CHUNK_TOKENS = 256  # positions whose logits exist at once: [256, 49152] float32 is 50 MB


@dataclass(frozen=True)
class Targets:
    """What the loss compares with, one row per loss token."""

    sampled_ids: Tensor  # [N] int64, the student's own tokens
    sampler_logprobs: Tensor  # [N] float32, by the engine that sampled them
    teacher_ids: Tensor  # [N, K] int64
    teacher_logprobs: Tensor  # [N, K] float32
    teacher_sampled: Tensor  # [N] float32, the teacher's log-prob of the sampled token
    sequence: Tensor  # [N] int64, which sequence of the micro-batch a row belongs to, ascending
    share: Tensor  # [N] float32, 1 / (loss tokens of the sequence * sequences of the global batch)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 (Maechler 2012: expm1 near zero, log1p elsewhere)."""
    near = torch.log(-torch.expm1(torch.clamp(x, min=-0.6931)))
    far = torch.log1p(-torch.exp(torch.clamp(x, max=-0.6931)))
    return torch.where(x > -0.6931, near, far)


def with_tail(logprobs: Tensor, vocabulary: int) -> Tensor:
    """Append log(1 - sum exp) as one more column: [N, K] -> [N, K + 1]; nothing to add when K is the vocabulary."""
    if logprobs.shape[-1] >= vocabulary:
        return logprobs
    floor = 8 * torch.finfo(logprobs.dtype).eps  # below this, 1 - sum is rounding noise
    inside = torch.logsumexp(logprobs, -1).clamp(max=-floor)
    return torch.cat([logprobs, log1mexp(inside)[:, None]], -1)


def divergence(log_p: Tensor, log_q: Tensor, config: LossConfig) -> Tensor:
    """Per-row divergence of two log-distributions over the same support: [N, S], [N, S] -> [N]."""
    if config.divergence == "forward":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if config.divergence == "reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if config.divergence == "jsd":
        beta = torch.tensor(config.beta, dtype=log_p.dtype, device=log_p.device)
        log_m = torch.logaddexp(log_p + torch.log1p(-beta), log_q + torch.log(beta))
        to_q = (log_q.exp() * (log_q - log_m)).sum(-1)
        to_p = (log_p.exp() * (log_p - log_m)).sum(-1)
        return beta * to_q + (1 - beta) * to_p
    raise ValueError(f"no divergence over a support is called {config.divergence!r}")


def token_objective(logits: Tensor, targets: Targets, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Objective to differentiate and value to report, per row: logits [N, V] -> [N], [N].

    They are the same but for `sampled`, whose value is the log-ratio log p(y) - log q(y) and whose objective is
    stop_gradient(log-ratio) * log p(y): the unbiased one-sample gradient of reverse KL (much noisier than a support).
    """
    log_z = torch.logsumexp(logits, -1, keepdim=True)
    if config.divergence == "sampled":
        own = (logits.gather(-1, targets.sampled_ids[:, None]) - log_z)[:, 0]
        ratio = own.detach() - targets.teacher_sampled
        return ratio * own, ratio
    log_p = with_tail(logits.gather(-1, targets.teacher_ids) - log_z, logits.shape[-1])
    log_q = with_tail(targets.teacher_logprobs.to(logits.dtype), logits.shape[-1]).detach()
    value = divergence(log_p, log_q, config)
    return value, value.detach()


def sampled_logprobs(logits: Tensor, sampled_ids: Tensor) -> Tensor:
    """log p of the sampled tokens: [N, V], [N] -> [N]."""
    return logits.gather(-1, sampled_ids[:, None])[:, 0] - torch.logsumexp(logits, -1)


def importance_weights(trainer: Tensor, targets: Targets, config: LossConfig) -> Tensor:
    """Truncated importance weight of every row, [N]: min(cap, exp(logp_trainer - logp_sampler)), by token or as the
    mean over the loss tokens of a sequence (the reference's form)."""
    if config.importance.level == "off":
        return torch.ones_like(trainer)
    ratio = torch.exp(trainer - targets.sampler_logprobs).clamp(max=config.importance.cap)
    if config.importance.level == "token":
        return ratio
    count = int(targets.sequence.max()) + 1 if len(ratio) else 0
    total = ratio.new_zeros(count).index_add_(0, targets.sequence, ratio)
    rows = ratio.new_zeros(count).index_add_(0, targets.sequence, torch.ones_like(ratio))
    return (total / rows.clamp(min=1))[targets.sequence]


class _Chunked(torch.autograd.Function):
    """Loss of all rows with both gradients, chunk by chunk; backward only scales what forward has computed."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Targets,
        config: LossConfig,
    ) -> tuple[Tensor, ...]:
        chunks = _chunks(targets.sequence, config.importance.level)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        trainer = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        for rows, known in chunks:
            if not known:
                trainer[rows] = sampled_logprobs(_logits(hidden[rows], head, bias), targets.sampled_ids[rows])
        scale = importance_weights(trainer, targets, config) * targets.share
        grad_hidden = torch.empty_like(hidden)
        grad_head: Tensor | None = None  # float32 while chunks add up; of a single chunk as it comes
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=head.device)
        values = torch.empty(len(hidden), dtype=trainer.dtype, device=hidden.device)
        for rows, known in chunks:
            here = _rows(targets, rows)
            logits = _logits(hidden[rows], head, bias)
            if known:
                trainer[rows] = sampled_logprobs(logits, here.sampled_ids)
                scale[rows] = importance_weights(trainer[rows], here, config) * here.share
            with torch.enable_grad():
                logits.requires_grad_()
                objective, value = token_objective(logits, here, config)
                (grad,) = torch.autograd.grad((objective * scale[rows]).sum(), logits)
            values[rows] = value
            grad = grad.to(head.dtype)
            grad_hidden[rows] = grad @ head
            part = grad.T @ hidden[rows]
            if grad_head is None:
                grad_head = part if len(chunks) == 1 else part.float()
            else:
                grad_head += part
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        grad_head = torch.zeros_like(head) if grad_head is None else grad_head.to(head.dtype)
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias)
        difference = trainer - targets.sampler_logprobs
        k3 = torch.expm1(difference) - difference
        tail = 1 - targets.teacher_logprobs.exp().sum(-1)
        return (values * scale).sum(), (values * targets.share).sum(), k3.sum(), tail.clamp(min=0).sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, grad_bias = ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None if grad_bias is None else grad_bias * grad, None, None


def divergence_loss(
    hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Targets, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This micro-batch's part of the batch: adding the parts of all micro-batches and ranks gives the batch's figures.

    hidden: [N, H] states that predict the loss tokens, in the model's dtype, as `head` [V, H] and `bias` [V].
    Returns four scalars: the importance-weighted loss (differentiable in the three), the divergence without weights,
    the sum over tokens of the k3 estimate of KL(sampler || trainer), the sum over tokens of the teacher's mass outside
    its top K.
    """
    return _Chunked.apply(hidden, head, bias, targets, config)


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden.detach(), head.detach(), None if bias is None else bias.detach())
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(sequence: Tensor, level: str) -> list[tuple[slice, bool]]:
    """Rows to do at once, and whether their importance weights can be known from their own logits.

    A sequence's weight needs all of its tokens, so chunks end where sequences end; only one longer than a chunk is cut,
    and its logits are computed twice.
    """
    if level != "sequence":
        return [(slice(i, i + CHUNK_TOKENS), True) for i in range(0, len(sequence), CHUNK_TOKENS)]
    chunks: list[tuple[slice, bool]] = []
    start = end = 0
    for count in torch.unique_consecutive(sequence, return_counts=True)[1].tolist():
        if start < end and end - start + count > CHUNK_TOKENS:
            chunks.append((slice(start, end), True))
            start = end
        end += count
        if count > CHUNK_TOKENS:
            chunks += [(slice(i, min(i + CHUNK_TOKENS, end)), False) for i in range(start, end, CHUNK_TOKENS)]
            start = end
    if start < end:
        chunks.append((slice(start, end), True))
    return chunks


def _rows(targets: Targets, rows: slice) -> Targets:
    return Targets(**{name: getattr(targets, name)[rows] for name in Targets.__dataclass_fields__})
