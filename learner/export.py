"""The student as a plain Hugging Face folder: weights, configuration, tokenizer, chat template."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

# What a model folder has beside its weights. Weights of the base model must not come along.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
WEIGHT_INDEX = "model.safetensors.index.json"


def write_student(base: Path, weights: dict[str, torch.Tensor], out: Path) -> None:
    """Write `weights` (Hugging Face names) into `out`, which must not exist, with everything else from `base`."""
    out.mkdir(parents=True)
    for pattern in COMPANIONS:
        for path in base.glob(pattern):
            if path.name != WEIGHT_INDEX:
                shutil.copy(path, out / path.name)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in weights.items()}, out / "model.safetensors", metadata={"format": "pt"})
