"""The student on disk: a Hugging Face folder, or with LoRA a peft adapter, which can be merged into such a folder.

The folder has the weight files of the base model's folder: the same names, each with the same tensors. A tied head that
the base stores twice is stored twice again.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdft.actors.shared.adapters import merged
from sdft.actors.shared.model_files import ADAPTER_CONFIG, COMPANIONS, INDEX, SINGLE, read_header, weight_files
from sdft.learner.checkpoint.saving import TensorFile
from sdft.learner.config import LoraConfig

WEIGHT_INDICES = "*.safetensors.index.json"  # describe the base model's files, so they are not copied
PEFT_PREFIX = "base_model.model."  # prefix of the names in a peft adapter
FORMAT = {"format": "pt"}  # metadata that transformers expects in a safetensors file


class BaseModelGone(Exception):
    """An adapter's base model is not at the path that the adapter names."""


def student_files(
    base: Path, weights: Mapping[str, torch.Tensor], tied: Mapping[str, str], out: Path
) -> list[TensorFile]:
    """Make the folder `out`, which must not exist, with everything from `base` except the weights.

    weights: the model's parameters by their Hugging Face names. tied: further names of parameters, each with the
    parameter's own name. Returns the files of the weights, not yet written.
    """
    out.mkdir(parents=True)
    copy_companions(base, out, next(iter(weights.values())).dtype)
    stored = {name for path in weight_files(base) for name in read_header(path)[0]}
    if weights.keys() - {tied.get(name, name) for name in stored}:
        # transformers names them differently from the files of `base`.
        return [TensorFile(out / SINGLE, dict(weights), FORMAT)]
    files = [TensorFile(out / path.name, _tensors(path, weights, tied), FORMAT) for path in weight_files(base)]
    write_index(base, out, {file.path.name: _sizes(file.tensors) for file in files})
    return files


def adapter_file(base: Path, adapters: dict[str, torch.Tensor], config: LoraConfig, out: Path) -> TensorFile:
    """Make the folder `out`, which must not exist, for LoRA adapters on `base`, in the form that peft loads.

    Returns the file of the adapters, not yet written.
    """
    from sdft.learner.weights.lora import peft_config

    out.mkdir(parents=True)
    peft_config(config, base).save_pretrained(out)
    tensors = {PEFT_PREFIX + name: tensor for name, tensor in adapters.items()}
    return TensorFile(out / "adapter_model.safetensors", tensors, FORMAT)


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
    copy_companions(base, out, dtype)
    weights = dict(merged(base, tensors, config["lora_alpha"] / config["r"], dtype))
    files = {path.name: {name: weights[name] for name in read_header(path)[0]} for path in weight_files(base)}
    for file_name, of_file in files.items():
        TensorFile(out / file_name, of_file, FORMAT).write()
    write_index(base, out, {file_name: _sizes(of_file) for file_name, of_file in files.items()})


def report(make: Callable[[Path, Path], str | None], arguments: Sequence[str]) -> None:
    """Make a folder from another one, and print why it could not be done, as JSON, for services/planning/derived.py.

    make: returns a fault of the folder. arguments: the two folders. What is printed is a `fault` of the folder or of
    the `disk`: ends of a sentence, null without one.
    """
    folder, out = map(Path, arguments)
    fault, disk = None, None
    try:
        fault = make(folder, out)
    except OSError as error:
        disk = f"{error.filename or out} cannot be written ({error.strerror})"
    print(json.dumps({"fault": fault, "disk": disk}))


def _tensors(path: Path, weights: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a weight file of the base model, with the values of `weights`.

    A tensor that is no parameter of the model, such as a buffer, is the base model's.
    """
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name in tied:
                tensors[name] = weights[tied[name]].clone()  # a file does not hold two names of the same memory
            else:
                tensors[name] = weights[name] if name in weights else file.get_tensor(name)
    return tensors


def _sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def write_index(base: Path, out: Path, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Write the index of weight files if the model folder `base` has one. sizes: bytes of each file's tensors."""
    if not (base / INDEX).exists():
        return
    total = sum(sum(of_file.values()) for of_file in sizes.values())
    names = {name: file for file, of_file in sizes.items() for name in sorted(of_file)}
    content = {"metadata": {"total_size": total}, "weight_map": names}
    (out / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def copy_companions(base: Path, out: Path, dtype: torch.dtype) -> None:
    """Copy a model folder except its weights, and set `dtype` in config.json."""
    for pattern in COMPANIONS:
        for path in base.glob(pattern):
            if not path.match(WEIGHT_INDICES):
                shutil.copyfile(path, out / path.name)  # without its permissions, which are for another folder
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
