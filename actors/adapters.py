"""LoRA adapters where they meet the model: merged into the base weights that lie on disk beside every process.

The learner's probe, the engines and the export merge the same bytes with these lines, so an adapter is all that need
travel:

    weight = W + scale * B A      W [out, in], A "lora_A" [rank, in], B "lora_B" [out, rank]      (Hu et al. 2021)
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DOWN, UP = "lora_A.weight", "lora_B.weight"  # as peft names them, in the place of "weight"


def change(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """scale * B A in float32: [rank, in], [out, rank] -> [out, in]."""
    return scale * (up.float() @ down.float())


def added(weight: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """weight + by in `dtype`; the sum is float32's."""
    return (weight.float() + by).to(dtype)


def merged(
    base: Path, adapters: Mapping[str, Tensor], scale: float, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model folder `base` in `dtype`, with the adapters in it.

    ValueError, after the last weight, if an adapter's is not in the folder.
    """
    unused = set(adapters)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name).to(dtype)
                pair = [name.removesuffix("weight") + part for part in (DOWN, UP)]
                if unused.issuperset(pair):
                    down, up = (adapters[part] for part in pair)
                    weight = added(weight, change(down, up, scale), dtype)
                    unused -= set(pair)
                yield name, weight
    if unused:
        raise ValueError(f"{base}: {len(unused)} adapters are of weights that it has not, among them {min(unused)}")
