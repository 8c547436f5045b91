"""The student on disk: a plain Hugging Face folder, or with LoRA a peft adapter, which can be made into one."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from sdft.actors.shared.adapters import merged
from sdft.actors.shared.model_files import ADAPTER_CONFIG, COMPANIONS, SINGLE, read_header, weight_files
from sdft.learner.checkpoint.saving import TensorFile
from sdft.learner.config import LoraConfig

WEIGHT_INDICES = "*.safetensors.index.json"  # of the base model, which must not come along
PEFT_PREFIX = "base_model.model."  # of the names in a peft adapter


class BaseModelGone(Exception):
    """An adapter's base model is not where it was."""


def student_file(base: Path, weights: dict[str, torch.Tensor], out: Path) -> TensorFile:
    """Make the folder `out`, which must not exist, with everything from `base` but the weights.

    Returned is the file of the weights (Hugging Face names), to be written.
    """
    out.mkdir(parents=True)
    _copy_companions(base, out, next(iter(weights.values())).dtype)
    return TensorFile(out / SINGLE, weights, {"format": "pt"})


def adapter_file(base: Path, adapters: dict[str, torch.Tensor], config: LoraConfig, out: Path) -> TensorFile:
    """The same for a student that is LoRA adapters on `base`: `out` becomes a folder that peft loads."""
    from sdft.learner.weights.lora import peft_config

    out.mkdir(parents=True)
    peft_config(config, base).save_pretrained(out)
    tensors = {PEFT_PREFIX + name: tensor for name, tensor in adapters.items()}
    return TensorFile(out / "adapter_model.safetensors", tensors, {"format": "pt"})


def merge_adapter(adapter: Path, out: Path) -> None:
    """Make the folder `out`, which must not exist: the adapter's base model with the adapter in it, in its dtype.

    BaseModelGone if the base model is not where it was, ValueError if it is not whole.
    """
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    base = Path(config["base_model_name_or_path"])
    if not base.is_dir():
        raise BaseModelGone(f"{base}, the adapter's base model, is not there")
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
    """All of a model folder but its weights, which will be of `dtype`."""
    for pattern in COMPANIONS:
        for path in base.glob(pattern):
            if not path.match(WEIGHT_INDICES):
                shutil.copyfile(path, out / path.name)  # not its permissions, which are for another folder
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
