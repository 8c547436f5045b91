"""The files of a model folder: its weight files, chosen as transformers chooses them, and the others.

    model.safetensors, alone          or          model.safetensors.index.json and the files that it names

Learner, engines, preflight and export all use this module, so they read the same weight files. It imports no torch.
Errors are ValueErrors with a sentence that names the file and the remedy.
"""

import json
import struct
from pathlib import Path
from typing import Any

# Files of a model folder besides its weights.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ORIGIN = "text_part_of.json"  # in the text part of a multimodal model: the whole model, and its names of the weights
QUANTIZATION = ("quantization_config", "compression_config")  # keys of config.json
FP8, MXFP4, COMPRESSED_TENSORS = "fp8", "mxfp4", "compressed-tensors"  # values of quant_method
AGAIN = "copy or download it again"
LFS_POINTER = b"version https://git-lfs"


def weight_files(folder: Path) -> list[Path]:
    """Weight files, sorted by name.

    Raises ValueError if one is missing, or if engines would load other files than the learner.
    """
    try:
        return _weight_files(folder)
    except OSError as error:
        raise _unreadable(error) from None


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header entry of each weight in a safetensors file, and the byte offset at which the weights begin.

    Raises ValueError if it is not a safetensors file, or if its size differs from the size that the header describes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            if not start:
                raise ValueError(f"{path} is empty; {AGAIN}")
            if start == LFS_POINTER:
                raise ValueError(f"{path} is a Git LFS pointer and holds no weights; run `git lfs pull` in its folder")
            begin = 8 + struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size + 1
            if begin > size:
                raise ValueError(f"{path} is incomplete, or not a safetensors file; {AGAIN}")
            file.seek(8)
            entries = json.loads(file.read(begin - 8))
            entries.pop("__metadata__", None)
            end = begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise _unreadable(error) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} has no valid safetensors header; {AGAIN}") from None
    if end != size:
        raise ValueError(f"{path} has {size} bytes and its header describes {end}; {AGAIN}")
    return entries, begin


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if the file holds anything else."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise _unreadable(error) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; {AGAIN}")
    return content


def quantization(folder: Path) -> dict[str, Any] | None:
    """The settings by which a model folder's weights are quantized, from config.json; None if they are not.

    Raises ValueError if config.json cannot be read.
    """
    config = read_json(folder / "config.json")
    sections = [section for section in (config, config.get("text_config")) if isinstance(section, dict)]
    found = (section.get(key) for section in sections for key in QUANTIZATION)
    return next((settings for settings in found if settings and isinstance(settings, dict)), None)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} makes transformers load an adapter in place of the folder's weights; name a "
            f"folder of whole weights, or move the adapter to a folder of its own"
        )
    single, index = folder / SINGLE, folder / INDEX
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index} has no weight_map that names files; {AGAIN}")
        files = sorted({folder / name for name in names.values()})
        if single.exists() and single not in files:
            raise ValueError(
                f"{folder} holds {SINGLE}, and an index of other files: the learner would load the one, engines the "
                f"others; move one of the two sets to another folder"
            )
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing ({INDEX} names it); copy or download it")
        return files
    others = sorted(path.name for path in folder.glob("*.safetensors") if path != single)
    if not single.is_file():
        there = f"; there is {others[0]}" if others else ""
        raise ValueError(
            f"{folder} lacks weights under the names that transformers expects: neither {SINGLE} nor {INDEX} exists"
            f"{there}"
        )
    if others:
        raise ValueError(
            f"{folder / others[0]} lies beside {SINGLE}, and engines would load both; move it to another folder"
        )
    return [single]


def _unreadable(error: OSError) -> ValueError:
    return ValueError(f"{error.filename} cannot be read ({error.strerror}); check its permissions")
