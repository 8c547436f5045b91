"""Check the kernels on this machine's GPU, each against its plain formula on small tensors, before a learner uses them.

small tensors ─┬─► kernel on the GPU ─┬─► equal to rounding: the learner uses the kernels
               └─► formula            ┴─► not, or an error (as without a C compiler): it uses plain layers, and warns
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sdft.learner.gpu import operations as o
from sdft.learner.gpu.adamw import AdamW

log = logging.getLogger(__name__)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative difference of a result
OF_SUPPORT = 1e-4  # of the divergence, a sum of small differences

Run = Callable[[Callable[..., Any]], Any]  # of an implementation; returns its results
Case = tuple[Any, Run, float]


@cache
def usable(device: str, dtype: torch.dtype) -> bool:
    """Whether the kernels of layers and loss work on a kind of device. On the meta device nothing is computed."""
    if device == "meta":
        return True
    return _works("the fused kernels of layers and loss", fault(torch.device(device), dtype, "cuda"))


@cache
def steps_in_one_pass(device: str) -> bool:
    """Whether the kernel of the optimizer's step works on a kind of device."""
    return _works("the fused kernel of AdamW", fault(torch.device(device), torch.float32, "cuda", step_cases))


def _works(what: str, why: str | None) -> bool:
    if why is not None:
        log.warning("%s: not used, so a step takes longer: %s", what, why)
    return why is None


def fault(
    device: torch.device,
    dtype: torch.dtype,
    implementation: str,
    of: Callable[[torch.device, torch.dtype], Iterator[Case]] | None = None,
) -> str | None:
    """Return the first operation that fails or differs from its formula on a device, as a sentence, or None.

    implementation: "cuda" for the kernels. of: makes the cases; None: those of layers and loss.
    """
    for kind, run, bound in (of or cases)(device, dtype):
        try:
            found, expected = run(getattr(kind, implementation)), run(kind.cpu)
            apart = max(difference(a, b) for a, b in zip(*map(_results, (found, expected)), strict=True))
        except Exception as error:  # noqa: BLE001 - a compiler's error, a driver's, or a missing Triton
            return f"{kind.__name__} fails in {dtype} ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        if not apart <= bound:  # true for NaN too
            return f"{kind.__name__} differs in {dtype} by {apart:.2g} of its value, and {bound:g} is allowed"
    return None


def _results(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def difference(found: Tensor, expected: Tensor) -> float:
    """The distance of two results, over the length of the expected one."""
    a, b = found.double(), expected.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-9))


def _on(*given: Any) -> Run:
    return lambda by: by(*given)


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield operations, a function that runs an implementation of each on the same tensors, and the largest difference.

    No size is a power of two or a multiple of a block, apart from a head's.
    """
    chance = torch.Generator().manual_seed(0)

    def made(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=chance).to(device, of)

    bound, wide = BOUND[dtype], torch.float32
    x, residual, weight, grad, past = made(7, 40), made(7, 40), made(40), made(7, 40), made(7, 40)
    for added in (None, residual):
        yield o.AddNorm, _on(x, added, weight, 1e-5), bound
    _, total, scale = o.AddNorm.cpu(x, residual, weight, 1e-5)

    def norm_backward(by: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        of_x, parts = by(grad, past, total, weight, scale)
        return of_x, parts.sum(0)  # the number of parts is the implementation's own

    yield o.NormBackward, norm_backward, bound
    gate, up, back = made(7, 50), made(7, 50), made(7, 50)
    yield o.Gated, _on(gate, up), bound
    yield o.GatedBackward, _on(back, gate, up), bound
    q, k, v, cos, sin = made(7, 3, 16), made(7, 1, 16), made(7, 1, 16), made(7, 16), made(7, 16)
    yield o.Rotary, _on(q, k, cos, sin), bound
    yield o.RotaryBackward, _on(q, k, v, cos, sin), bound
    parts = made(7, 40, of=wide)
    yield o.ColumnSum, _on(parts, dtype), bound

    rows = made(7, 60)  # further apart than the logits are long, as with a vocabulary of fewer tokens
    logits, slope = rows[:, :50], made(7, 1, of=wide)
    ids = torch.randint(50, (7, 5), generator=chance).to(device)

    def log_probs(by: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        out, normalizer = torch.empty(7, 5, device=device), torch.empty(7, device=device)
        by(logits, ids, out, normalizer)
        return out, normalizer

    def softmax_gradient(by: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        copied = rows.clone()
        by(copied[:, :50], log_probs(o.LogProbs.cpu)[1], slope)
        return copied[:, :50], copied[:, 50:]  # the latter is not its to write

    yield o.LogProbs, log_probs, BOUND[wide]
    yield o.SoftmaxGradient, softmax_gradient, bound
    log_p, log_q = (torch.log_softmax(made(7, 60, of=wide) * x, -1)[:, :5].contiguous() for x in (1.0, 2.0))
    log_p[5:], log_q[6] = torch.log_softmax(log_p[5:], -1), torch.log_softmax(log_q[6], -1)  # without a tail
    for reverse in (False, True):
        for tail in (False, True):
            for clip in (float("inf"), 0.4):
                given = (log_p, log_q, reverse, tail, 8 * torch.finfo(wide).eps, clip)
                yield o.SupportDivergence, _on(*given), OF_SUPPORT


def step_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield steps of the optimizer, as `cases` does, without and with a teacher."""
    chance = torch.Generator().manual_seed(0)
    p, grad, mean, square, teacher = (torch.randn(60, generator=chance).to(device, dtype) for _ in range(5))
    rates = 3, 1e-3, 0.9, 0.999, 1e-8, 0.1, 0.25  # step, lr, beta1, beta2, eps, weight_decay, alpha

    for followed in (None, teacher):

        def step(by: Callable[..., Any], followed: Tensor | None = followed) -> tuple[Tensor, ...]:
            changed = [t.clone() for t in (p, mean, square.abs())]
            own = None if followed is None else followed.clone()
            by(changed[0], grad, *changed[1:], own, *rates)
            return *changed, *(() if own is None else (own,))

        yield AdamW, step, BOUND[dtype]
