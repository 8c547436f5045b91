"""Merges LoRA adapters into the base weights, which every process can read from disk.

The learner's probe, the engines and the export merge the same bytes with this code, so only the adapters are sent:

    weight = W + scale * B A      W [out, in], A "lora_A" [rank, in], B "lora_B" [out, rank]      (Hu et al. 2021)
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sdft.actors.shared.model_files import weight_files

DOWN, UP = "lora_A.weight", "lora_B.weight"  # peft's suffixes, in place of "weight"


def adapted(weight: Tensor, down: Tensor, up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """weight + scale * B A, [out, in], computed in float32 and rounded to `dtype` once."""
    return torch.addmm(weight.float(), up.float(), down.float(), alpha=scale).to(dtype)


def merged(
    base: Path, adapters: Mapping[str, Tensor], scale: float, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of the model folder `base` in `dtype`, adapters merged in, on the adapters' device.

    Raises ValueError, after the last weight, if the folder lacks the weight of an adapter.
    """
    unused = set(adapters)
    device = next((adapter.device for adapter in adapters.values()), None)
    for path in weight_files(base):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name).to(device, dtype)
                pair = [name.removesuffix("weight") + part for part in (DOWN, UP)]
                if unused.issuperset(pair):
                    down, up = (adapters[part] for part in pair)
                    weight = adapted(weight, down, up, scale, dtype)
                    unused -= set(pair)
                yield name, weight
    if unused:
        raise ValueError(f"{base}: {len(unused)} adapters are for weights that it does not have, such as {min(unused)}")
