"""Compare Triton's kernels with the plain formulas, on a CPU in Triton's interpreter or on a GPU.

TRITON_INTERPRET=1 python -m tests.learner.gpu.interpreted      prints the dtypes that agree
"""

import torch
from torch import Tensor

from sdft.learner.gpu import operations as o

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def made(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def agree(kernels: tuple[Tensor, ...], formulas: tuple[Tensor, ...], bound: float) -> None:
    for ours, theirs in zip(kernels, formulas, strict=True):
        assert ours.dtype == theirs.dtype
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-9)
        assert difference <= bound, f"the kernel differs by {difference:.2g}, and {bound:g} is allowed"


def compare(dtype: torch.dtype) -> None:
    """Compare every operation. The sizes are no powers of two, and no multiples of a block."""
    bound = BOUND[dtype]
    x, residual, weight = made(dtype, 7, 40), made(dtype, 7, 40) + 1, made(dtype, 40)
    grad, past = made(dtype, 7, 40) * 2, made(dtype, 7, 40) - 1
    for added in (None, residual):
        agree(o.AddNorm.cuda(x, added, weight, 1e-5), o.AddNorm.cpu(x, added, weight, 1e-5), bound)
    _, total, scale = o.AddNorm.cpu(x, residual, weight, 1e-5)
    ours, theirs = (kind(grad, past, total, weight, scale) for kind in (o.NormBackward.cuda, o.NormBackward.cpu))
    agree((ours[0], ours[1].sum(0)), (theirs[0], theirs[1].sum(0)), bound)
    o.PROGRAMS = 3  # fewer than rows, so that a program adds up several
    ours = o.NormBackward.cuda(grad, past, total, weight, scale)
    agree((ours[0], ours[1].sum(0)), (theirs[0], theirs[1].sum(0)), bound)

    o.ELEMENTS = 16  # several programs for each row
    gate, up, grad = made(dtype, 7, 50), made(dtype, 7, 50) + 1, made(dtype, 7, 50) * 2
    agree((o.Gated.cuda(gate, up),), (o.Gated.cpu(gate, up),), bound)
    agree(o.GatedBackward.cuda(grad, gate, up), o.GatedBackward.cpu(grad, gate, up), bound)

    q, k, v = made(dtype, 7, 3, 16), made(dtype, 7, 1, 16), made(dtype, 7, 1, 16) + 1
    cos = made(dtype, 7, 16)
    sin = cos + 1
    agree(o.Rotary.cuda(q, k, cos, sin), o.Rotary.cpu(q, k, cos, sin), bound)
    agree((o.RotaryBackward.cuda(q, k, v, cos, sin),), (o.RotaryBackward.cpu(q, k, v, cos, sin),), bound)
    parts = made(torch.float32, 7, 40)
    agree((o.ColumnSum.cuda(parts, dtype),), (o.ColumnSum.cpu(parts, dtype),), bound)

    log_p, log_q = (torch.log_softmax(made(torch.float32, 7, 60) * x, -1)[:, :5].contiguous() for x in (1.0, 2.0))
    log_p[5:], log_q[6] = torch.log_softmax(log_p[5:], -1), torch.log_softmax(log_q[6], -1)  # without a tail
    for reverse in (False, True):
        for tail in (False, True):
            for clip in (float("inf"), 0.4):
                given = (log_p, log_q, reverse, tail, 8 * torch.finfo(torch.float32).eps, clip)
                agree(o.SupportDivergence.cuda(*given), o.SupportDivergence.cpu(*given), 1e-4)

    wide = made(dtype, 7, 60)
    logits = wide[:, :50]  # rows are further apart than their length, as with a vocabulary of fewer tokens
    ids = torch.randint(50, (7, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for log_probs in (o.LogProbs.cuda, o.LogProbs.cpu):
        out, normalizer = torch.empty(7, 5, device=DEVICE), torch.empty(7, device=DEVICE)
        log_probs(logits, ids, out, normalizer)
        results.append((out, normalizer))
    agree(results[0], results[1], 1e-5)
    slope = made(torch.float32, 7, 1)
    gradients = [wide.clone(), wide.clone()]
    for kind, g in zip((o.SoftmaxGradient.cuda, o.SoftmaxGradient.cpu), gradients, strict=True):
        kind(g[:, :50], results[1][1], slope)
    agree((gradients[0],), (gradients[1],), bound)
    assert torch.equal(gradients[0][:, 50:], wide[:, 50:]), "the gradient writes beyond the vocabulary"


if __name__ == "__main__":
    for dtype in BOUND:
        compare(dtype)
        print(str(dtype).removeprefix("torch."))
