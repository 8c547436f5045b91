"""The sizes of a model that memory depends on, from config.json and the headers of its weight files."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.actors.shared.model_files import read_header, read_json, weight_files
from sdft.learner.config import LoraConfig
from sdft.services.base.errors import UserError

SAMPLED = 64  # bytes read of each weight
# Model types whose layers learner/model/fused.py replaces. It may take more: their memory is overestimated.
FUSED = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")

# Of each weight file: its path, its header's entries by weight, and the offset of its data.
Headers = list[tuple[Path, dict[str, Any], int]]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model. `layers` to `heads` are 0 if config.json has other names for them."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    adapted: int = 0  # parameters of the weights that LoRA changes
    adapters: int = 0  # parameters of the adapters
    queries: int = 0  # numbers in a token's queries, in all heads
    keys: int = 0  # numbers in a token's keys, and in its values
    embeddings: int = (
        0  # parameters of the weights of vocabulary size: the embedding, and a head that is not tied to it
    )
    fused: bool = False  # the learner has fused layers for it on a GPU

    @classmethod
    def of(cls, model: Path, headers: Headers, lora: LoraConfig | None = None) -> "ModelShape":
        """Return the shape of a model folder. UserError if a target of `lora` does not exist."""
        weights = _weights(headers)
        config = read_json(model / "config.json")
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
        layers, hidden, intermediate, vocabulary, heads = (int(config.get(name) or 0) for name in names)
        size = int(config.get("head_dim") or (hidden // heads if heads else 0))
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
            queries=heads * size,
            keys=int(config.get("num_key_value_heads") or heads) * size,
            embeddings=sum(math.prod(shape) for shape in weights.values() if len(shape) == 2 and vocabulary in shape),
            fused=config.get("model_type") in FUSED,
        )


def check_files(model: Path) -> None:
    """UserError unless config.json can be read and every weight file is there and whole."""
    try:
        read_json(model / "config.json")
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    read_headers(model)


def read_headers(model: Path) -> Headers:
    """Read the header of each weight file. UserError if one is damaged."""
    try:
        return [(path, *read_header(path)) for path in weight_files(model)]
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def embedding_rows(headers: Headers) -> int | None:
    """Number of rows of the input embedding; None if no weight has one of the names in EMBEDDINGS."""
    return min((shape[0] for name, shape in _weights(headers).items() if name.endswith(EMBEDDINGS)), default=None)


def sample_of_weights(headers: Headers) -> bytes:
    """Return up to SAMPLED bytes from the middle of every weight, sorted by name, to tell models of one shape apart."""
    found = {}
    for path, entries, begin in headers:
        with path.open("rb") as file:
            for name, entry in entries.items():
                first, last = entry["data_offsets"]
                file.seek(begin + (first + last) // 2)
                found[name] = file.read(min(SAMPLED, last - (first + last) // 2))
    return b"".join(name.encode() + found[name] for name in sorted(found))


def _weights(headers: Headers) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight."""
    return {name: tuple(entry["shape"]) for _, entries, _ in headers for name, entry in entries.items()}


def _adapted(
    model: Path, weights: dict[str, tuple[int, ...]], vocabulary: int, lora: LoraConfig
) -> list[tuple[int, ...]]:
    """Shapes of the weights that adapters change: linear layers, without those of vocabulary size."""
    linear: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in weights.items():
        if name.endswith(".weight") and len(shape) == 2 and vocabulary not in shape:
            linear.setdefault(name.split(".")[-2], []).append(shape)
    for target in lora.targets:
        if target not in linear:
            raise UserError(
                f"learner.lora.targets: {target} is not a linear layer of the model in {model} that can be adapted; "
                f"choose from {', '.join(sorted(linear))}"
            )
    return [shape for name in lora.targets or linear for shape in linear[name]]
