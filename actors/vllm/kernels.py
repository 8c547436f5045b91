"""vLLM's fused norm kernels for CPU engines."""

import functools
from typing import Any

import torch
from vllm.config.kernel import IrOpPriorityConfig

from sdft.actors.vllm.compat import Takes, register_fused_norms

FUSED = "sdft_cpu"  # our registration name for vLLM's kernels


def fused_norms() -> IrOpPriorityConfig:
    """Select vLLM's fused norm kernels, which its CPU build contains but its CPU platform does not choose.

    A fused kernel replaces half a dozen passes over the tensor. Rollouts take 0.92 to 0.95 of the time
    (benchmarks.rollouts). Compiled models (execution: compiled) fuse the native norms without it.
    """
    return IrOpPriorityConfig(**{name: [FUSED, "native"] for name in register_fused_norms(FUSED, _contiguous)})


def _contiguous(takes: Takes) -> Takes:
    """`takes`, restricted to contiguous tensors.

    The kernels ignore strides and read row after row. On a view, such as Qwen3's queries and keys, they would read the
    wrong numbers.
    """

    @functools.wraps(takes)
    def supported(*given: Any, **named: Any) -> bool:
        tensors = [x for x in (*given, *named.values()) if isinstance(x, torch.Tensor)]
        return all(x.is_contiguous() for x in tensors) and takes(*given, **named)

    return supported
