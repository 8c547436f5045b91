"""The student on disk: a Hugging Face folder, or with LoRA a peft adapter, which can be merged into such a folder."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from sdft.actors.shared.adapters import merged
from sdft.actors.shared.model_files import ADAPTER_CONFIG, COMPANIONS, SINGLE, read_header, weight_files
from sdft.learner.checkpoint.saving import TensorFile
from sdft.learner.config import LoraConfig

WEIGHT_INDICES = "*.safetensors.index.json"  # describe the base model's files, so they are not copied
PEFT_PREFIX = "base_model.model."  # prefix of the names in a peft adapter


class BaseModelGone(Exception):
    """An adapter's base model is not at the path that the adapter names."""


def student_file(base: Path, weights: dict[str, torch.Tensor], out: Path) -> TensorFile:
    """Make the folder `out`, which must not exist, with everything from `base` except the weights.

    Returns the file of the weights (Hugging Face names), not yet written.
    """
    out.mkdir(parents=True)
    _copy_companions(base, out, next(iter(weights.values())).dtype)
    return TensorFile(out / SINGLE, weights, {"format": "pt"})


def adapter_file(base: Path, adapters: dict[str, torch.Tensor], config: LoraConfig, out: Path) -> TensorFile:
    """Make the folder `out`, which must not exist, for LoRA adapters on `base`, in the form that peft loads.

    Returns the file of the adapters, not yet written.
    """
    from sdft.learner.weights.lora import peft_config

    out.mkdir(parents=True)
    peft_config(config, base).save_pretrained(out)
    tensors = {PEFT_PREFIX + name: tensor for name, tensor in adapters.items()}
    return TensorFile(out / "adapter_model.safetensors", tensors, {"format": "pt"})


def merge_adapter(adapter: Path, out: Path) -> None:
    """Make the folder `out`, which must not exist: the base model with the adapter merged, in the adapter's dtype.

    Raises BaseModelGone if the base model is not at its path, ValueError if it is not whole.
    """
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    base = Path(config["base_model_name_or_path"])
    if not base.is_dir():
        raise BaseModelGone(f"{base}, the adapter's base model, does not exist")
    for path in weight_files(base):
        read_header(path)
    tensors = {
        name.removeprefix(PEFT_PREFIX): t for name, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    dtype = next(iter(tensors.values())).dtype
    out.mkdir(parents=True)
    _copy_companions(base, out, dtype)
    weights = dict(merged(base, tensors, config["lora_alpha"] / config["r"], dtype))
    TensorFile(out / SINGLE, weights, {"format": "pt"}).write()


def _copy_companions(base: Path, out: Path, dtype: torch.dtype) -> None:
    """Copy a model folder except its weights, and set `dtype` in config.json."""
    for pattern in COMPANIONS:
        for path in base.glob(pattern):
            if not path.match(WEIGHT_INDICES):
                shutil.copyfile(path, out / path.name)  # without its permissions, which are for another folder
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
