"""RMSNorm that saves for backward only its input, in the model's dtype, and one number per row.

The norms of models save their input in float32 and again rounded. On a CPU the forward is bit-identical to the
module's own; a norm that computes other bits is left as it is. On a GPU the forward is torch's, which rounds once
instead of twice: one kernel where the model's own norm has eight.
"""

from collections.abc import Iterator
from functools import partial, reduce

import torch
from torch import Tensor, nn

from sdft.learner.model.compat import epsilon

CACHED = 600_000  # numbers per block, 2.4 MB in float32: a block is read and written repeatedly


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight, x [..., H], weight [H]; the quotient is rounded to the dtype of x before the product."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.reshape(-1, x.shape[-1])
        out, scale = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=wide)
        for some, its_scale, its_out in _cached_blocks(rows, scale, out):
            h = some.to(wide, copy=True)
            torch.mean(h * h, -1, keepdim=True, out=its_scale)
            its_scale.add_(eps).rsqrt_()
            its_out.copy_(h.mul_(its_scale)).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        w, rows = weight.to(scale.dtype), x.reshape(-1, x.shape[-1])
        grad_x, grads_w = torch.empty_like(rows), []
        for some, its_grad, its_scale, its_grad_x in _cached_blocks(rows, grad.reshape(rows.shape), scale, grad_x):
            n, g = some.to(scale.dtype, copy=True).mul_(its_scale), its_grad.to(scale.dtype, copy=True)
            product = g * n
            grads_w.append(product.sum(0))
            # d x = scale * (d n - n * mean(d n * n)), with d n = g * w
            mean = (product @ w).div_(len(w)).unsqueeze(-1)
            its_grad_x.copy_(g.mul_(w).sub_(n.mul_(mean)).mul_(its_scale))
        return grad_x.view(x.shape), reduce(torch.add, grads_w).to(weight.dtype), None


def _cached_blocks(rows: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of rows of each tensor, with as many rows as stay in a CPU's cache."""
    most = max(1, CACHED // rows.shape[1])
    return zip(*(x.split(most) for x in (rows, *others)), strict=True)


def _forward(module: nn.Module, eps: float, x: Tensor) -> Tensor:
    if x.is_cuda:
        return nn.functional.rms_norm(x, module.weight.shape, module.weight, eps)
    return _RMSNorm.apply(x, module.weight, eps)


@torch.no_grad()
def replace_norms(model: nn.Module) -> int:
    """Replace the forward of the model's RMSNorms where both compute the same bits. Returns how many are replaced."""
    count = 0
    for module in model.modules():
        if (eps := epsilon(module)) is not None:
            replacement, weight = partial(_forward, module, eps), module.weight
            x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
            if torch.equal(replacement(x), module(x)):
                module.forward = replacement
                count += 1
    return count
