"""What a snapshot is made of."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Content:
    """What a snapshot is made of."""

    weights: Iterable[tuple[str, torch.Tensor]]  # Hugging Face names; to be iterated over once, a collective
    nbytes: int  # of all of them
    scale: float | None = None  # they are LoRA adapters, to be merged into the base model
