"""Model folders as they come from the hub: changes of a folder whose weights are in one file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sdft.actors.shared.model_files import INDEX, SINGLE, weight_files

Tensors = dict[str, torch.Tensor]


def tensors_of(model: Path) -> Tensors:
    """The weights of all files of a model folder."""
    return {name: tensor for path in weight_files(model) for name, tensor in load_file(path).items()}


def change(model: Path, how: Callable[[Tensors], object]) -> None:
    """Change the weights in place."""
    tensors = load_file(model / SINGLE)
    how(tensors)
    save_file(tensors, model / SINGLE, {"format": "pt"})


def configure(model: Path, **settings: object) -> None:
    """Set entries of config.json; None removes one."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text()) | settings
    (model / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


def shard(model: Path) -> list[Path]:
    """Split the weights into two files and an index."""
    tensors = list(load_file(model / SINGLE).items())
    parts = [tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]]
    files = [model / f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for path, part in zip(files, parts, strict=True):
        save_file(dict(part), path, {"format": "pt"})
    names = {name: path.name for path, part in zip(files, parts, strict=True) for name, _ in part}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (model / SINGLE).unlink()
    return files


def head_twice(model: Path) -> None:
    """Store the tied head a second time, under its own name."""
    change(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))


def stored_in(model: Path, dtype: torch.dtype) -> None:
    change(model, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    configure(model, dtype=str(dtype).removeprefix("torch."))


def as_it_comes(model: Path) -> Path:
    """Store the model in float16, its head twice, in two files, with no `architectures` in config.json."""
    head_twice(model)
    stored_in(model, torch.float16)
    configure(model, architectures=None)
    shard(model)
    return model


def quantize_fp8(model: Path, block: int = 128) -> dict[str, torch.Tensor]:
    """Quantize the linear layers as DeepSeek's and Qwen's FP8 folders are. Returns the weights that they stand for."""
    meant: Tensors = {}

    def quantized(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors[name].float()
            rows, columns = (-(-size // block) for size in weight.shape)
            scale = torch.empty(rows, columns)
            for i in range(rows):
                for j in range(columns):
                    part = weight[i * block : (i + 1) * block, j * block : (j + 1) * block]
                    scale[i, j] = part.abs().max() / 448
                    part /= scale[i, j]
            tensors[name] = weight.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
            whole = scale.repeat_interleave(block, 0)[: weight.shape[0]].repeat_interleave(block, 1)
            meant[name] = (tensors[name].float() * whole[:, : weight.shape[1]]).bfloat16()

    change(model, quantized)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block] * 2}
    configure(model, quantization_config=settings, dtype="bfloat16")
    return meant
