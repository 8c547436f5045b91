"""Write a model folder again without quantization, one weight file at a time. The names of the weights stay.

    python -m sdft.learner.weights.dequantize FOLDER OUT     prints why it could not be done, as JSON (export.report)

    fp8                  number * the scale of its block, of quantization_config's weight_block_size
    mxfp4                number of 4 bits * 2^(scale - 127), one scale for 32 numbers (OCP Microscaling Formats 1.0)
    compressed-tensors   as the package of this name computes it

The weights are those that transformers computes with `dequantize=True` in FineGrainedFP8Config, Mxfp4Config and
CompressedTensorsConfig. transformers itself would need the memory of the whole model, and gives weights of mixtures of
experts other names and shapes than engines load.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdft.actors.shared.model_files import (
    FP8,
    MXFP4,
    QUANTIZATION,
    quantization,
    read_header,
    read_json,
    weight_files,
)
from sdft.actors.shared.process import large_imports

with large_imports():
    import torch
    from pydantic import ValidationError
    from safetensors import safe_open
    from torch import Tensor

    from sdft.learner.checkpoint.saving import TensorFile
    from sdft.learner.weights.export import FORMAT, copy_companions, report, write_index

BLOCK = (128, 128)  # of FP8, where quantization_config does not name one
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# The 16 numbers of 4 bits: sign, two bits of exponent, one of mantissa.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
# Tensors that belong to a quantized layer of compressed-tensors, besides what holds its numbers.
BESIDE = ("scale", "shape", "zero_point", "g_idx", "global_scale")
OF_ACTIVATIONS = ("activation_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale")
OF_CACHE = ("k_scale", "v_scale", "q_scale")

Names = set[str]
Get = Callable[[str], Tensor]  # reads a tensor of the folder
Undo = Callable[[str, Names, Get], tuple[str, Tensor] | None]  # name and tensor; None: part of another tensor


def dequantize(folder: Path, out: Path) -> None:
    """Write the model folder `out`, which must not exist. Raises ValueError, with a sentence, if it cannot be done."""
    settings = quantization(folder) or {}
    config = read_json(folder / "config.json")
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    files = weight_files(folder)
    held = {path: list(read_header(path)[0]) for path in files}
    where = {name: path for path, of_file in held.items() for name in of_file}
    names, undo = set(where), _undo(settings, dtype)
    out.mkdir(parents=True)
    sizes: dict[str, dict[str, int]] = {}
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in files}

        def get(name: str) -> Tensor:
            return opened[where[name]].get_tensor(name)

        for path, of_file in held.items():
            tensors = dict(filter(None, (undo(name, names, get) for name in of_file)))
            TensorFile(out / path.name, tensors, FORMAT).write()
            sizes[path.name] = {name: tensor.nbytes for name, tensor in tensors.items()}
    copy_companions(folder, out, dtype)
    write_index(folder, out, sizes)
    _forget(out / "config.json")


def _undo(settings: dict[str, Any], dtype: torch.dtype) -> Undo:
    method = settings.get("quant_method")
    if method == FP8:
        block = settings.get("weight_block_size", BLOCK)
        return lambda name, names, get: _fp8(name, names, get, block, dtype)
    if method == MXFP4:
        return lambda name, names, get: _mxfp4(name, names, get, dtype)
    return _compressed_tensors(settings, dtype)


def _fp8(
    name: str, names: Names, get: Get, block: Sequence[int] | None, dtype: torch.dtype
) -> tuple[str, Tensor] | None:
    if name.endswith(("_scale_inv", *OF_ACTIVATIONS)):
        return None
    tensor, scale = get(name), f"{name}_scale_inv"
    if tensor.dtype in FP8_DTYPES and scale in names:
        return name, scaled(tensor, get(scale), block).to(dtype)
    if tensor.dtype in FP8_DTYPES or scale in names:
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, and only FP8 with {scale} is known")
    return name, tensor


def scaled(numbers: Tensor, scale: Tensor, block: Sequence[int] | None) -> Tensor:
    """Return numbers [..., out, in] * the scale of their block, in float32. Blocks at the edges may be smaller.

    scale: [..., blocks of out, blocks of in]; one number for a whole tensor. In uint8 it is the exponent of 2, and 127.
    """
    factor = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if factor.ndim > 1 and block is not None:
        rows, columns = numbers.shape[-2:]
        needed = -(-rows // block[0]), -(-columns // block[1])
        if factor.shape[-2:] != needed:
            raise ValueError(
                f"a tensor of the shape {list(numbers.shape)} has scales of the shape {list(scale.shape)}, and "
                f"weight_block_size {list(block)} needs {list(needed)}"
            )
        factor = factor.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :rows, :columns]
    return numbers.float() * factor


def _mxfp4(name: str, names: Names, get: Get, dtype: torch.dtype) -> tuple[str, Tensor] | None:
    stem, _, part = name.rpartition("_")
    if {f"{stem}_blocks", f"{stem}_scales"} <= names and part in ("blocks", "scales"):
        if part == "scales":
            return None
        experts = zip(get(name), get(f"{stem}_scales"), strict=True)
        return stem, torch.stack([unpacked(*of_one).T.to(dtype) for of_one in experts])
    return name, get(name)


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the weights of one expert, [out, in] in float32.

    blocks: [out, in / 32, 16] uint8, two numbers each, the first in the low bits. scales: [out, in / 32] uint8.
    """
    numbers = FP4[torch.stack([blocks & 15, blocks >> 4], -1).int()].flatten(-2)
    return torch.ldexp(numbers, scales.int()[..., None] - 127).flatten(-2)


def _compressed_tensors(settings: dict[str, Any], dtype: torch.dtype) -> Undo:
    """A layer is quantized if it has a weight_scale. Its group of settings is the first that targets it."""
    from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]
    from compressed_tensors.compressors.format import infer_module_format  # type: ignore[import-untyped]
    from compressed_tensors.config import CompressionFormat  # type: ignore[import-untyped]
    from compressed_tensors.quantization import QuantizationConfig  # type: ignore[import-untyped]
    from compressed_tensors.utils.match import match_name  # type: ignore[import-untyped]

    for key in ("transform_config", "sparsity_config"):
        if settings.get(key):
            raise ValueError(f"{key} of its quantization_config is not undone here")
    try:
        groups = list(QuantizationConfig.model_validate(settings).config_groups.values())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key} of quantization_config in config.json is wrong ({first['msg']})") from None

    def weight(layer: str, names: Names, get: Get) -> Tensor:
        targeting = [g for g in groups if "Linear" in g.targets or any(match_name(layer, t) for t in g.targets)]
        if not targeting:
            raise ValueError(f"{layer} is quantized, and no group of config_groups targets it")
        form = targeting[0].format or infer_module_format(torch.nn.Linear, targeting[0])
        compressor = BaseCompressor.get_value_from_registry(CompressionFormat(form).value)
        parts = ["weight", "weight_packed", *(f"weight_{part}" for part in BESIDE)]
        state = {part: get(f"{layer}.{part}") for part in parts if f"{layer}.{part}" in names}
        dense: Tensor = compressor.decompress(state, targeting[0])["weight"]
        return dense.to(dtype)

    def undo(name: str, names: Names, get: Get) -> tuple[str, Tensor] | None:
        layer, _, part = name.rpartition(".")
        if part in (*OF_CACHE, *OF_ACTIVATIONS):
            return None
        if f"{layer}.weight_scale" not in names or not part.startswith("weight"):
            return name, get(name)
        return (f"{layer}.weight", weight(layer, names, get)) if part in ("weight", "weight_packed") else None

    return undo


def _forget(path: Path) -> None:
    """Remove the settings of quantization from config.json."""
    config = read_json(path)
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            for key in QUANTIZATION:
                section.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def why_not(folder: Path, out: Path) -> str | None:
    """Dequantize, and return why it failed, as the end of a sentence, or None."""
    try:
        dequantize(folder, out)
    except ValueError as error:
        return str(error)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        return f"its files do not fit the quantization_config in config.json ({type(error).__name__}: {reason})"
    return None


if __name__ == "__main__":
    report(why_not, sys.argv[1:])
