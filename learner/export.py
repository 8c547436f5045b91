"""The student as a plain Hugging Face folder: weights, configuration, tokenizer, chat template."""

import json
import shutil
from pathlib import Path

import torch

from learner.saving import TensorFile

# What a model folder has beside its weights. Weights of the base model must not come along.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
WEIGHT_INDEX = "model.safetensors.index.json"


def student_file(base: Path, weights: dict[str, torch.Tensor], out: Path) -> TensorFile:
    """Make the folder `out`, which must not exist, with everything from `base` but the weights.

    Returned is the file of the weights (Hugging Face names), to be written.
    """
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
    return TensorFile(out / "model.safetensors", weights, {"format": "pt"})
