"""The shape of a model folder, read from config.json and the headers of its weights: what memory depends on."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sdft.learner.config import LoraConfig
from sdft.services.base.errors import UserError

SAMPLED = 64  # bytes of each weight


@dataclass(frozen=True)
class ModelShape:
    """Numbers of numbers. Layers to heads are 0 where config.json names them otherwise."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    adapted: int = 0  # in the weights that LoRA changes
    adapters: int = 0  # in the adapters themselves

    @classmethod
    def of(cls, model: Path, lora: LoraConfig | None = None) -> "ModelShape":
        """Of a local model folder. UserError if it holds no weights, or none that `lora` names."""
        weights = _weights(model)
        config = json.loads((model / "config.json").read_text())
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
        layers, hidden, intermediate, vocabulary, heads = (int(config.get(name) or 0) for name in names)
        adapted = [] if lora is None else _adapted(model, weights, vocabulary, lora)
        return cls(
            parameters=sum(map(math.prod, weights.values())),
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            vocabulary=vocabulary,
            heads=heads,
            adapted=sum(map(math.prod, adapted)),
            adapters=0 if lora is None else lora.rank * sum(map(sum, adapted)),
        )


def sample_of_weights(model: Path) -> bytes:
    """A few bytes from the middle of every weight, by its name: another model of the same shape has others."""
    found = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            entries, begin = _header(file)
            for name, entry in entries.items():
                first, last = entry["data_offsets"]
                file.seek(begin + (first + last) // 2)
                found[name] = file.read(min(SAMPLED, last - (first + last) // 2))
    return b"".join(name.encode() + found[name] for name in sorted(found))


def _header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of each weight in it, and where their bytes begin."""
    (size,) = struct.unpack("<Q", file.read(8))
    entries = json.loads(file.read(size))
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}, 8 + size


def _weights(model: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, from the headers of the safetensors files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            entries, _ = _header(file)
        shapes |= {name: tuple(entry["shape"]) for name, entry in entries.items()}
    if not shapes:
        raise UserError(f"{model}: no .safetensors file with weights in this folder")
    return shapes


def _adapted(
    model: Path, weights: dict[str, tuple[int, ...]], vocabulary: int, lora: LoraConfig
) -> list[tuple[int, ...]]:
    """Shapes of the weights that adapters change: of linear layers, but those to and from the vocabulary."""
    linear: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in weights.items():
        if name.endswith(".weight") and len(shape) == 2 and vocabulary not in shape:
            linear.setdefault(name.split(".")[-2], []).append(shape)
    for target in lora.targets:
        if target not in linear:
            raise UserError(
                f"learner.lora.targets: {target} is no linear layer of the model in {model} that can be adapted; "
                f"there are: {', '.join(sorted(linear))}"
            )
    return [shape for name in lora.targets or linear for shape in linear[name]]
