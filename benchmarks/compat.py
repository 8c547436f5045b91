"""What the benchmarks use of vLLM and TRL that is not documented. Known for the versions below.

tests/benchmarks/test_compat.py has one line for each name and fails without it. The libraries are imported where they
are used: TRL has an environment of its own.
"""

from typing import Any

from torch import Tensor

VLLM = "0.32.0"
TRL = "1.16.0"


def onednn_layout(matrix: Tensor) -> object:
    """A matrix [out, in] laid out by oneDNN, as vLLM's CPU linear layers do. Uses vllm._custom_ops.create_onednn_mm."""
    from vllm import _custom_ops

    return _custom_ops.create_onednn_mm(matrix.t())


def distillation_batch(trainer: Any, rows: list[Any]) -> dict[str, Any]:
    """Rollouts and teacher inputs for rows of a TRL trainer's data set. Uses its _prepare_training_batch."""
    batch: dict[str, Any] = trainer._prepare_training_batch(rows)
    return batch
