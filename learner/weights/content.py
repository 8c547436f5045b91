"""The weights that a snapshot is made of."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Content:
    """The weights that a snapshot is made of."""

    weights: Iterable[tuple[str, torch.Tensor]]  # Hugging Face names; can be iterated over once, which is a collective
    nbytes: int  # of all weights
    scale: float | None = None  # if set, the weights are LoRA adapters, to be merged into the base model
