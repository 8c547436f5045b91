"""vLLM's fused norm kernels for CPU engines."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm import ir
from vllm.config.kernel import IrOpPriorityConfig

FUSED = "sdft_cpu"  # our registration name for vLLM's kernels


def fused_norms() -> IrOpPriorityConfig:
    """Select vLLM's fused norm kernels, which its CPU build contains but its CPU platform does not choose.

    A fused kernel replaces half a dozen passes over the tensor. Rollouts take 0.92 to 0.95 of the time
    (benchmarks.rollouts). Compiled models (enforce_eager: false) fuse the native norms without it.
    """
    from vllm.kernels import vllm_c

    kernels = {
        "rms_norm": (ir.ops.rms_norm, vllm_c.rms_norm, vllm_c.rms_no_var_size),
        "fused_add_rms_norm": (ir.ops.fused_add_rms_norm, vllm_c.fused_add_rms_norm, vllm_c.rms_add_no_var_size),
    }
    for op, kernel, takes in kernels.values():
        if FUSED not in op.impls:
            op.register_impl(FUSED, supports_args=_contiguous(takes), inplace=kernel.inplace)(kernel.impl_fn)
    return IrOpPriorityConfig(**{name: [FUSED, "native"] for name in kernels})


def _contiguous(takes: Callable[..., bool]) -> Callable[..., bool]:
    """`takes`, restricted to contiguous tensors.

    The kernels ignore strides and read row after row. On a view, such as Qwen3's queries and keys, they would read the
    wrong numbers.
    """

    @functools.wraps(takes)
    def supported(*given: Any, **named: Any) -> bool:
        tensors = [x for x in (*given, *named.values()) if isinstance(x, torch.Tensor)]
        return all(x.is_contiguous() for x in tensors) and takes(*given, **named)

    return supported
