"""The self-distillation divergence of teacher and student, over a support of K tokens and one tail bucket.

Forward is KL(q||p), reverse is KL(p||q), for teacher q and student p; jsd mixes m = (1-beta) p + beta q. Cutting both
distributions to K tokens and one bucket for the rest is a coarsening, whichever tokens they are, so the divergence is a
lower bound of the full one and equals it for K = V. No gradient reaches the teacher or the importance weights.

Logits exist for one chunk of positions at a time, so `divergence_loss` computes value and gradient without a
[tokens, vocabulary] array.

Rows of the head beyond the tokenizer are in no distribution: engines give them the logit -inf, and the softmax here is
over the other rows. So the log-probs of sampler, teacher and trainer are of one vocabulary, the tail bucket has no mass
of tokens that do not exist, and these rows get no gradient. To hide them only when an engine samples would not do: its
log-probs would be those of a renormalised distribution, and the trainer's not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sdft.learner.config import CHUNK_BYTES, LossConfig
from sdft.learner.loss.divergences import clipped, support, support_objective
from sdft.learner.loss.groups import groups_of
from sdft.learner.loss.importance import importance_weights, length_weights
from sdft.learner.loss.scaling import IDENTITY, LogitScaling
from sdft.learner.loss.targets import Targets

# Bytes of float32 scratch per block: on a CPU it fits the cache; on a GPU it adds a quarter of a chunk's size, because
# kernel launches dominate.
FLOAT32_BYTES = {"cpu": 3 << 20, "cuda": 24 << 20}
VOCABULARY_ROWS = {"cpu": 8192, "cuda": 1 << 30}  # rows of the head's gradient that are added up at once


class _Chunked(torch.autograd.Function):
    """Loss of all rows with its gradients, chunk by chunk; backward only scales the gradients from forward.

    The divergence depends on the logits z only through the log-probs l = z[support] - logsumexp(z). With
    g = d objective / d l, a small [N, S] array, d objective / d z = scatter(g) - softmax(z) * sum(g).
    The entropy H is that of the whole vocabulary: d H / d z = -p (log p + H) with p = softmax(z).
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Targets,
        config: LossConfig,
        scaling: LogitScaling,
        vocabulary: int | None,
    ) -> tuple[Tensor, ...]:
        whole_head, whole_bias = head, bias
        head, bias = head[:vocabulary], None if bias is None else bias[:vocabulary]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows_at_once = max(1, CHUNK_BYTES // (len(head) * head.element_size()))
        groups = groups_of(targets.sequence, config.importance.level, rows_at_once)
        chunks = sum(map(len, groups))
        longest = max((rows.stop - rows.start for group in groups for rows in group), default=0)
        buffer = hidden.new_empty(longest, len(head))  # a chunk's logits, then their gradient. Fresh pages cost time
        trainer, scale, values = torch.empty(3, len(hidden), dtype=wide, device=hidden.device)
        entropy = trainer.new_zeros(len(hidden))
        grad_hidden = torch.empty_like(hidden)
        trained = whole_head.requires_grad  # False with LoRA: the head's gradient is then not computed
        shape = whole_head.shape if trained else (0,)
        grad_head = torch.zeros(shape, dtype=wide if chunks > 1 else head.dtype, device=head.device)
        grad_bias = torch.zeros(0 if whole_bias is None else len(whole_bias), dtype=wide, device=head.device)
        for group in groups:
            of_group = slice(group[0].start, group[-1].stop)
            group_targets = _rows(targets, of_group)
            ids = support(group_targets, config)
            wanted = torch.cat([group_targets.sampled_ids[:, None], ids], -1)
            known = hidden.new_empty(wanted.shape, dtype=wide)  # one block: small ones among large fragment the heap
            parts = [slice(rows.start - of_group.start, rows.stop - of_group.start) for rows in group]
            for rows, part in zip(group, parts, strict=True):
                logits = scaling.apply_(_logits(hidden[rows], head, bias, buffer))
                _log_probs(logits, wanted[part], known[part])
                if config.entropy:
                    _entropy(logits, entropy[rows])
            trainer[of_group] = known[:, 0]
            scale[of_group] = importance_weights(known[:, 0], group_targets, config) * group_targets.share
            if config.length is not None:
                scale[of_group] *= length_weights(group_targets.completion, config.length)
            with torch.enable_grad():
                log_p = known[:, 1:].requires_grad_()
                objective, values[of_group] = support_objective(log_p, group_targets, len(head), config)
                (grad_log_p,) = torch.autograd.grad((objective * scale[of_group]).sum(), log_p)
            slope = -grad_log_p.sum(-1, keepdim=True)
            if config.entropy:
                bend = config.entropy * scale[of_group, None]
                slope = torch.cat([slope + bend * entropy[of_group, None], bend], -1)
            at_ids = grad_log_p + _outside(log_p.detach(), slope)
            for rows, part in zip(group, parts, strict=True):
                if len(group) > 1:  # the buffer holds the last chunk's logits
                    logits = scaling.apply_(_logits(hidden[rows], head, bias, buffer))
                _to_gradient(logits, slope[part], ids[part], at_ids[part], scaling)
                torch.mm(logits, head, out=grad_hidden[rows])
                if trained:
                    _add_product(grad_head[:vocabulary], logits, hidden[rows])
                if bias is not None:
                    grad_bias[:vocabulary] += logits.sum(0)
        logits = buffer = hidden.new_empty(0)  # frees the buffer before the head's gradient is copied
        head_grad = grad_head.to(head.dtype) if trained else None
        ctx.grads = grad_hidden, head_grad, None if bias is None else grad_bias.to(bias.dtype)
        difference = trainer - targets.sampler_logprobs
        k3 = torch.expm1(difference) - difference
        k3 = torch.where(targets.sampler_logprobs.isnan(), 0, k3)  # tokens that the student did not sample
        tail = 1 - targets.teacher_logprobs.exp().sum(-1)
        counted = clipped(values, config)
        lost = counted - config.entropy * entropy if config.entropy else counted
        return (
            (lost * scale).sum(),
            (values * targets.share).sum(),
            k3.sum(),
            tail.clamp(min=0).sum(),
            (counted < values).sum().to(wide),
            entropy.sum(),
        )

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("divergence_loss can be differentiated once: its gradients are scaled in place")
        grads, ctx.grads = ctx.grads, None
        return *(None if g is None else g.mul_(grad) for g in grads), None, None, None, None


def divergence_loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Targets,
    config: LossConfig,
    scaling: LogitScaling = IDENTITY,
    vocabulary: int | None = None,
) -> tuple[Tensor, ...]:
    """Return this micro-batch's part of the batch's figures. The parts of all micro-batches and ranks add up to them.

    hidden: [N, H] states that predict the loss tokens, in the model's dtype, like `head` [V, H] and `bias` [V].
    scaling: what the model does to its head's logits.
    vocabulary: the number of the head's first rows that are tokens; None: all.
    Returns six scalars: the loss (differentiable once, in hidden, head and bias), the divergence without weights and
    clip, the sum over the student's tokens of the k3 estimate of KL(sampler || trainer), the sum over tokens of the
    teacher's mass outside the support, the number of tokens whose divergence is clipped, and the sum over tokens of the
    student's entropy (0 unless the loss has it).
    """
    return _Chunked.apply(hidden, head, bias, targets, config, scaling, vocabulary)


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Compute logits [n, V] in the model's dtype, into the first rows of `buffer`."""
    out = buffer[: len(hidden)]
    return torch.mm(hidden, head.T, out=out) if bias is None else torch.addmm(bias, hidden, head.T, out=out)


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of a few rows of each tensor at a time."""
    most = max(1, FLOAT32_BYTES[logits.device.type] // (4 * logits.shape[1]))
    return zip(*(x.split(most) for x in (logits, *others)), strict=True)


def _log_probs(logits: Tensor, ids: Tensor, out: Tensor) -> None:
    """Write the log-probs of the tokens `ids` to `out`: [n, V] and [n, S] -> [n, S], in the dtype of `out`."""
    for block, its_ids, its_out in _blocks(logits, ids, out):
        torch.gather(torch.log_softmax(block, -1, dtype=out.dtype), -1, its_ids, out=its_out)


def _entropy(logits: Tensor, out: Tensor) -> None:
    """Write the entropy of each row of logits [n, V] to `out` [n], in nats."""
    for block, its_out in _blocks(logits, out):
        log_p = torch.log_softmax(block, -1, dtype=out.dtype)
        torch.sum(log_p.exp().mul_(log_p), -1, out=its_out).neg_()


def _outside(log_p: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient at tokens as if they were outside the support: [n, S] log-probs -> [n, S].

    slope: a in a p, [n, 1], or with the entropy a and b in p (a + b log p), [n, 2].
    """
    if slope.shape[1] == 1:
        return log_p.exp() * slope
    return log_p.exp() * (slope[:, :1] + slope[:, 1:] * log_p)


def _to_gradient(logits: Tensor, slope: Tensor, ids: Tensor, at_ids: Tensor, scaling: LogitScaling) -> None:
    """Overwrite scaled logits [n, V] with the gradient of the head's logits.

    That is `_outside`, and `at_ids` at the tokens `ids`, each times the slope of the scaling.
    """
    at_ids = scaling.back_(at_ids, logits.gather(1, ids))
    for block, its_slope in _blocks(logits, slope):
        # A temporary without a name is freed before the next block allocates its own.
        if slope.shape[1] == 1:
            block.copy_(scaling.back_(torch.softmax(block, -1, dtype=its_slope.dtype).mul_(its_slope), block))
        else:
            log_p = torch.log_softmax(block, -1, dtype=its_slope.dtype)
            block.copy_(scaling.back_(log_p.exp().mul_(log_p.mul_(its_slope[:, 1:]).add_(its_slope[:, :1])), block))
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    with _any_order():
        logits[rows, ids] = at_ids.to(logits.dtype)  # scatter_ on a CPU in half precision would copy all to float32


@contextmanager
def _any_order() -> Iterator[None]:
    """Let a GPU write elements in any order. The ids of a row are distinct, so every element is written once. In
    deterministic mode the GPU would sort them first, with twenty small kernels per call."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total [V, H] += grad.T @ hidden. On a CPU some rows at a time, so that the product is never whole in memory."""
    most = VOCABULARY_ROWS[total.device.type]
    for part, columns in zip(total.split(most), grad.split(most, dim=1), strict=True):
        part += columns.T @ hidden


def _rows(targets: Targets, rows: slice) -> Targets:
    return Targets(**{name: getattr(targets, name)[rows] for name in Targets.__dataclass_fields__})
