"""The loss's inputs besides the student's forward, one row per loss token."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The loss's inputs besides the student's forward, one row per loss token."""

    sampled_ids: Tensor  # [N] int64, the student's own tokens
    sampler_logprobs: Tensor  # [N] float32, from the engine that sampled them
    teacher_ids: Tensor  # [N, K] int64, the support
    teacher_logprobs: Tensor  # [N, K] float32
    teacher_sampled: Tensor  # [N] float32, the teacher's log-prob of the sampled token
    sequence: Tensor  # [N] int64, index of the row's sequence in the micro-batch, ascending
    completion: Tensor  # [N] float32, tokens that the row's sequence completes, in the loss or not
    share: Tensor  # [N] float32, 1 / (loss tokens of the sequence * sequences of the global batch)

    def to(self, device: torch.device | str) -> "Targets":
        """Return the targets on another device."""
        return self._each(lambda values: values.to(device))

    def rows(self, which: slice | Tensor) -> "Targets":
        """Return the targets of some rows: a slice, or a mask [N]."""
        return self._each(lambda values: values[which])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        return Targets(**{field.name: change(getattr(self, field.name)) for field in fields(self)})
