"""The fused operations of layers and loss, without gradients of their own.

Matrices have one row for each token. They are contiguous, except where a docstring allows columns of a larger one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdft.learner.gpu.registry import ELEMENTS, kernels, operation

PROGRAMS = 512  # of the norm's backward: each adds up the weight's gradient over its rows
COLUMNS = 32  # of a program of a sum over rows


def block_of(width: int) -> int:
    """Return the power of two that a row of this width fits into."""
    return 1 << (width - 1).bit_length()


@operation("add_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
class AddNorm:
    """Add, then RMSNorm: x, residual [N, H] and weight [H] -> normed [N, H], the sum [N, H], 1 / rms [N] float32.

    Without a residual the sum is empty.
    """

    @staticmethod
    def cuda(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        out, total, scale = AddNorm.meta(x, residual, weight, eps)
        rows, width = x.shape
        kernels().norm_forward[(rows,)](
            x, residual, weight, out, total, scale, width, eps, residual is not None, block_of(width)
        )
        return out, total, scale

    @staticmethod
    def cpu(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        total = x if residual is None else x + residual
        h = total.float()
        scale = torch.rsqrt((h * h).mean(-1) + eps)
        out = (h * scale[:, None]).to(x.dtype) * weight
        return out, x.new_empty(0) if residual is None else total, scale

    @staticmethod
    def meta(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        total = x.new_empty(0) if residual is None else torch.empty_like(x)
        return torch.empty_like(x), total, x.new_empty(len(x), dtype=torch.float32)


@operation(
    "norm_backward(Tensor grad, Tensor grad_total, Tensor total, Tensor weight, Tensor scale) -> (Tensor, Tensor)"
)
class NormBackward:
    """Gradients of the sum [N, H] and of the weight: [N, H], and parts of it [parts, H] float32, to be added up.

    grad_total: the gradient that reaches the sum past the norm.
    """

    @staticmethod
    def cuda(grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, parts = NormBackward.meta(grad, grad_total, total, weight, scale)
        rows, width = total.shape
        kernels().norm_backward[(len(parts),)](
            grad, grad_total, total, weight, scale, grad_x, parts, rows, width, block_of(width)
        )
        return grad_x, parts

    @staticmethod
    def cpu(grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        n, g = total.float() * scale[:, None], grad.float()
        gw = g * weight.float()
        grad_x = scale[:, None] * (gw - n * (gw * n).mean(-1, keepdim=True)) + grad_total.float()
        return grad_x.to(total.dtype), (g * n).sum(0, keepdim=True)

    @staticmethod
    def meta(grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        parts = min(PROGRAMS, len(total))
        return torch.empty_like(total), total.new_empty(parts, total.shape[1], dtype=torch.float32)


@operation("gated(Tensor gate, Tensor up) -> Tensor")
class Gated:
    """silu(gate) * up: [N, I] each."""

    @staticmethod
    def cuda(gate: Tensor, up: Tensor) -> Tensor:
        out, count = torch.empty_like(gate), gate.numel()
        kernels().gate_forward[(-(-count // ELEMENTS),)](gate, up, out, count, ELEMENTS)
        return out

    @staticmethod
    def cpu(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    @staticmethod
    def meta(gate: Tensor, up: Tensor) -> Tensor:
        return torch.empty_like(gate)


@operation("gated_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")
class GatedBackward:
    """The product of the forward again, [N, I], and the gradients of gate and up side by side, [N, 2 I]."""

    @staticmethod
    def cuda(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        out, both = GatedBackward.meta(grad, gate, up)
        rows, width = gate.shape
        kernels().gate_backward[(rows, -(-width // ELEMENTS))](grad, gate, up, out, both, width, ELEMENTS)
        return out, both

    @staticmethod
    def cpu(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        g, d = gate.float(), grad.float()
        sigmoid = torch.sigmoid(g)
        silu = g * sigmoid
        rounded = silu.to(gate.dtype)
        of_gate, of_up = d * up.float() * sigmoid * (1 + g - silu), d * rounded.float()
        return rounded * up, torch.cat([of_gate, of_up], -1).to(gate.dtype)

    @staticmethod
    def meta(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(gate), gate.new_empty(len(gate), 2 * gate.shape[1])


@operation("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
class Rotary:
    """Rotary embedding of q [T, heads, D] and k [T, kv heads, D] by angles [T, D]. D is a power of two.

    q and k may be columns of a larger matrix.
    """

    @staticmethod
    def cuda(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        outs = Rotary.meta(q, k, cos, sin)
        _launch_rotate(q, k, k, cos, sin, (*outs, outs[1]), back=False)
        return outs

    @staticmethod
    def cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return _rotated(q, cos, sin, back=False), _rotated(k, cos, sin, back=False)

    @staticmethod
    def meta(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape)


@operation("rotary_backward(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin) -> Tensor")
class RotaryBackward:
    """Gradients before the rotation from those behind it, and v's, side by side: [T, (heads + 2 kv heads) D]."""

    @staticmethod
    def cuda(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = RotaryBackward.meta(q, k, v, cos, sin)
        parts = out.split([x[0].numel() for x in (q, k, v)], dim=1)
        _launch_rotate(q, k, v, cos, sin, parts, back=True)
        return out

    @staticmethod
    def cpu(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated = [_rotated(x, cos, sin, back=True) for x in (q, k)]
        return torch.cat([x.flatten(1) for x in (*rotated, v)], -1)

    @staticmethod
    def meta(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return q.new_empty(len(q), sum(x[0].numel() for x in (q, k, v)))


def _launch_rotate(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, outs: Sequence[Tensor], *, back: bool
) -> None:
    tokens, heads, width = q.shape
    sizes = heads, k.shape[1], *(x.stride(0) for x in (q, k, v, *outs))
    blocks = block_of(heads), block_of(k.shape[1]), width // 2
    kernels().rotate[(tokens,)](q, k, v, cos, sin, *outs, *sizes, back, *blocks)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    a, b = x.float().chunk(2, -1)
    (c1, c2), (s1, s2) = (t.float()[:, None].chunk(2, -1) for t in (cos, sin))
    parts = (a * c1 + b * s2, b * c2 - a * s1) if back else (a * c1 - b * s1, b * c2 + a * s2)
    return torch.cat(parts, -1).to(x.dtype)


@operation("column_sum(Tensor parts, ScalarType dtype) -> Tensor")
class ColumnSum:
    """The sum of parts [N, H] float32 over N, rounded once: [H]."""

    @staticmethod
    def cuda(parts: Tensor, dtype: torch.dtype) -> Tensor:
        out, (rows, width) = ColumnSum.meta(parts, dtype), parts.shape
        kernels().column_sum[(-(-width // COLUMNS),)](parts, out, rows, width, COLUMNS)
        return out

    @staticmethod
    def cpu(parts: Tensor, dtype: torch.dtype) -> Tensor:
        return parts.sum(0).to(dtype)

    @staticmethod
    def meta(parts: Tensor, dtype: torch.dtype) -> Tensor:
        return parts.new_empty(parts.shape[1], dtype=dtype)


@operation("log_probs_(Tensor logits, Tensor ids, Tensor(a!) out, Tensor(b!) normalizer) -> ()")
class LogProbs:
    """Log-probs of tokens, logits [N, V] and ids [N, S] -> out [N, S], and logsumexp of each row, normalizer [N]."""

    @staticmethod
    def cuda(logits: Tensor, ids: Tensor, out: Tensor, normalizer: Tensor) -> None:
        rows, count = ids.shape
        kernels().log_probs[(rows,)](
            logits, ids, out, normalizer, logits.shape[1], logits.stride(0), count, ELEMENTS, block_of(count)
        )

    @staticmethod
    def cpu(logits: Tensor, ids: Tensor, out: Tensor, normalizer: Tensor) -> None:
        wide = logits.float()
        normalizer.copy_(torch.logsumexp(wide, -1))
        out.copy_(wide.gather(1, ids) - normalizer[:, None])

    @staticmethod
    def meta(logits: Tensor, ids: Tensor, out: Tensor, normalizer: Tensor) -> None:
        pass


@operation("softmax_gradient_(Tensor(a!) logits, Tensor normalizer, Tensor slope) -> ()")
class SoftmaxGradient:
    """Overwrite logits [N, V] with slope [N, 1] times their softmax. normalizer [N]: as of log_probs_."""

    @staticmethod
    def cuda(logits: Tensor, normalizer: Tensor, slope: Tensor) -> None:
        rows, vocabulary = logits.shape
        kernels().softmax_gradient[(rows, -(-vocabulary // ELEMENTS))](
            logits, normalizer, slope, vocabulary, logits.stride(0), ELEMENTS
        )

    @staticmethod
    def cpu(logits: Tensor, normalizer: Tensor, slope: Tensor) -> None:
        logits.copy_((logits.float() - normalizer[:, None]).exp() * slope)

    @staticmethod
    def meta(logits: Tensor, normalizer: Tensor, slope: Tensor) -> None:
        pass


@operation("support(Tensor log_p, Tensor log_q, bool reverse, bool tail, float floor, float clip) -> (Tensor, Tensor)")
class SupportDivergence:
    """KL(q||p), or with `reverse` KL(p||q), over a support and its tail, and its gradient in log_p.

    log_p, log_q: [N, S] float32. Returns [N] and [N, S]. tail: whether a bucket holds what the support leaves, whose
    mass is at least 1 - exp(-floor). Where the value exceeds `clip` the gradient is 0.
    """

    @staticmethod
    def cuda(
        log_p: Tensor, log_q: Tensor, reverse: bool, tail: bool, floor: float, clip: float
    ) -> tuple[Tensor, Tensor]:
        value, grad = SupportDivergence.meta(log_p, log_q, reverse, tail, floor, clip)
        rows, count = log_p.shape
        kernels().support[(rows,)](log_p, log_q, value, grad, count, floor, clip, reverse, tail, block_of(count))
        return value, grad

    @staticmethod
    def cpu(
        log_p: Tensor, log_q: Tensor, reverse: bool, tail: bool, floor: float, clip: float
    ) -> tuple[Tensor, Tensor]:
        p, q = log_p.exp(), log_q.exp()
        value = ((log_p - log_q) * p if reverse else (log_q - log_p) * q).sum(-1)
        grad = p * (log_p - log_q + 1) if reverse else -q
        if tail:
            sums = [torch.logsumexp(x, -1, keepdim=True) for x in (log_p, log_q)]
            tail_p, tail_q = (torch.log(-torch.expm1(x.clamp(max=-floor))) for x in sums)
            of_tail = -(sums[0] - tail_p).exp() * (log_p - sums[0]).exp() * (sums[0] <= -floor)
            if reverse:
                value += (tail_p.exp() * (tail_p - tail_q))[:, 0]
                grad += tail_p.exp() * (tail_p - tail_q + 1) * of_tail
            else:
                value += (tail_q.exp() * (tail_q - tail_p))[:, 0]
                grad -= tail_q.exp() * of_tail
        return value, grad * (value <= clip)[:, None]

    @staticmethod
    def meta(
        log_p: Tensor, log_q: Tensor, reverse: bool, tail: bool, floor: float, clip: float
    ) -> tuple[Tensor, Tensor]:
        return log_p.new_empty(len(log_p)), log_p.new_empty(log_p.shape)


fused: Any = torch.ops.sdft
