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

import torch
from torch import Tensor

from sdft.learner.config import CHUNK_BYTES, LossConfig
from sdft.learner.loss.divergences import clipped, gradient, support
from sdft.learner.loss.groups import groups_of
from sdft.learner.loss.importance import importance_weights, length_weights
from sdft.learner.loss.scaling import IDENTITY, LogitScaling
from sdft.learner.loss.targets import Targets
from sdft.learner.loss.vocabulary import add_product, entropy, fusable, log_probs, on, outside, to_gradient


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
        rows_at_once = max(1, on(head.device, CHUNK_BYTES) // (len(head) * head.element_size()))
        groups = groups_of(targets.sequence, config.importance.level, rows_at_once)
        chunks = sum(map(len, groups))
        longest = max((rows.stop - rows.start for group in groups for rows in group), default=0)
        buffer = hidden.new_empty(longest, len(head))  # a chunk's logits, then their gradient. Fresh pages cost time
        trainer, scale, values = torch.empty(3, len(hidden), dtype=wide, device=hidden.device)
        entropies = trainer.new_zeros(len(hidden))
        width = support(targets, config).shape[1]
        normalizers = torch.empty_like(trainer) if fusable(hidden, width, config, scaling) else None
        grad_hidden = torch.empty_like(hidden)
        trained = whole_head.requires_grad  # False with LoRA: the head's gradient is then not computed
        shape = whole_head.shape if trained else (0,)
        grad_head = torch.zeros(shape, dtype=wide if chunks > 1 else head.dtype, device=head.device)
        grad_bias = torch.zeros(0 if whole_bias is None else len(whole_bias), dtype=wide, device=head.device)
        for group in groups:
            of_group = slice(group[0].start, group[-1].stop)
            group_targets = targets.rows(of_group)
            ids = support(group_targets, config)
            wanted = torch.cat([group_targets.sampled_ids[:, None], ids], -1)
            known = hidden.new_empty(wanted.shape, dtype=wide)  # one block: small ones among large fragment the heap
            parts = [slice(rows.start - of_group.start, rows.stop - of_group.start) for rows in group]
            for rows, part in zip(group, parts, strict=True):
                logits = scaling.apply_(_logits(hidden[rows], head, bias, buffer))
                log_probs(logits, wanted[part], known[part], _some(normalizers, rows))
                if config.entropy:
                    entropy(logits, entropies[rows])
            trainer[of_group] = known[:, 0]
            scale[of_group] = importance_weights(known[:, 0], group_targets, config) * group_targets.share
            if config.length is not None:
                scale[of_group] *= length_weights(group_targets.completion, config.length)
            log_p, is_fused = known[:, 1:], normalizers is not None
            grad_log_p, values[of_group] = gradient(log_p, group_targets, scale[of_group], len(head), config, is_fused)
            slope = -grad_log_p.sum(-1, keepdim=True)
            if config.entropy:
                bend = config.entropy * scale[of_group, None]
                slope = torch.cat([slope + bend * entropies[of_group, None], bend], -1)
            at_ids = grad_log_p + outside(log_p, slope)
            for rows, part in zip(group, parts, strict=True):
                if len(group) > 1:  # the buffer holds the last chunk's logits
                    logits = scaling.apply_(_logits(hidden[rows], head, bias, buffer))
                of_rows = _some(normalizers, rows)
                to_gradient(logits, slope[part], ids[part], at_ids[part], scaling, of_rows)
                torch.mm(logits, head, out=grad_hidden[rows])
                if trained:
                    add_product(grad_head[:vocabulary], logits, hidden[rows])
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
        lost = counted - config.entropy * entropies if config.entropy else counted
        return (
            (lost * scale).sum(),
            (values * targets.share).sum(),
            k3.sum(),
            tail.clamp(min=0).sum(),
            (counted < values).sum().to(wide),
            entropies.sum(),
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


def _some(numbers: Tensor | None, rows: slice) -> Tensor | None:
    return None if numbers is None else numbers[rows]
