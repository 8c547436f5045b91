"""Passes over the logits of a chunk [n, V]: log-probs and entropy out of them, and their gradient in place.

On a CPU, and with an entropy or a scaling of the logits, a few rows at a time in float32. Otherwise on a GPU one fused
kernel for each pass (learner/gpu).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sdft.learner.config import FLOAT32_BYTES, WIDEST, LossConfig
from sdft.learner.gpu.check import usable
from sdft.learner.gpu.operations import fused
from sdft.learner.loss.scaling import IDENTITY, LogitScaling

VOCABULARY_ROWS = {"cpu": 8192, "cuda": 1 << 30}  # rows of the head's gradient that are added up at once


def on(device: torch.device, sizes: dict[str, int]) -> int:
    """Return the size for a device. Torch's meta device, on which operations are counted, has a GPU's."""
    return sizes["cpu" if device.type == "cpu" else "cuda"]


def fusable(hidden: Tensor, width: int, config: LossConfig, scaling: LogitScaling) -> bool:
    """Whether fused kernels compute these passes: they are known here, and work on this GPU.

    width: the number of tokens in the support.
    """
    on_gpu = hidden.device.type != "cpu" and hidden.dtype != torch.float64
    known = on_gpu and width <= WIDEST and not config.entropy and scaling == IDENTITY
    return known and usable(hidden.device.type, hidden.dtype)


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of a few rows of each tensor at a time."""
    most = max(1, on(logits.device, FLOAT32_BYTES) // (4 * logits.shape[1]))
    return zip(*(x.split(most) for x in (logits, *others)), strict=True)


def log_probs(logits: Tensor, ids: Tensor, out: Tensor, normalizer: Tensor | None) -> None:
    """Write the log-probs of the tokens `ids` to `out`: [n, V] and [n, S] -> [n, S], in the dtype of `out`.

    normalizer: [n] float32, for the logsumexp of each row, which the fused `to_gradient` takes; None: not fused.
    """
    if normalizer is not None:
        fused.log_probs_(logits, ids, out, normalizer)
        return
    for block, its_ids, its_out in _blocks(logits, ids, out):
        torch.gather(torch.log_softmax(block, -1, dtype=out.dtype), -1, its_ids, out=its_out)


def entropy(logits: Tensor, out: Tensor) -> None:
    """Write the entropy of each row of logits [n, V] to `out` [n], in nats."""
    for block, its_out in _blocks(logits, out):
        log_p = torch.log_softmax(block, -1, dtype=out.dtype)
        torch.sum(log_p.exp().mul_(log_p), -1, out=its_out).neg_()


def outside(log_p: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient at tokens as if they were outside the support: [n, S] log-probs -> [n, S].

    slope: a in a p, [n, 1], or with the entropy a and b in p (a + b log p), [n, 2].
    """
    if slope.shape[1] == 1:
        return log_p.exp() * slope
    return log_p.exp() * (slope[:, :1] + slope[:, 1:] * log_p)


def to_gradient(
    logits: Tensor, slope: Tensor, ids: Tensor, at_ids: Tensor, scaling: LogitScaling, normalizer: Tensor | None
) -> None:
    """Overwrite scaled logits [n, V] with the gradient of the head's logits.

    That is `outside`, and `at_ids` at the tokens `ids`, each times the slope of the scaling. normalizer: of log_probs.
    """
    if normalizer is not None:
        fused.softmax_gradient_(logits, normalizer, slope)
    else:
        at_ids = scaling.back_(at_ids, logits.gather(1, ids))
        _blocks_to_gradient(logits, slope, scaling)
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    with _any_order():
        logits[rows, ids] = at_ids.to(logits.dtype)  # scatter_ on a CPU in half precision would copy all to float32


def _blocks_to_gradient(logits: Tensor, slope: Tensor, scaling: LogitScaling) -> None:
    for block, its_slope in _blocks(logits, slope):
        # A temporary without a name is freed before the next block allocates its own.
        if slope.shape[1] == 1:
            block.copy_(scaling.back_(torch.softmax(block, -1, dtype=its_slope.dtype).mul_(its_slope), block))
        else:
            log_p = torch.log_softmax(block, -1, dtype=its_slope.dtype)
            block.copy_(scaling.back_(log_p.exp().mul_(log_p.mul_(its_slope[:, 1:]).add_(its_slope[:, :1])), block))


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


def add_product(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total [V, H] += grad.T @ hidden. On a CPU some rows at a time, so that the product is never whole in memory."""
    most = on(total.device, VOCABULARY_ROWS)
    for part, columns in zip(total.split(most), grad.split(most, dim=1), strict=True):
        part += columns.T @ hidden
