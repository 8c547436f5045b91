"""Decide from a model's configuration whether the learner can train it. Does not import torch."""

from pathlib import Path
from typing import Any

# Layer types with attention, and those that compute each token by itself. All others carry a state along the tokens.
ATTENTION = {"full_attention", "sliding_attention", "attention", "hybrid"}
BY_ITSELF = {"mlp", "moe"}
STATEFUL = {"rwkv", "xlstm"}  # models whose configuration lists no layer types

# Exceptions that a model's code raises when it does not fit its configuration or its arguments.
BROKEN = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)


class Untrainable(ValueError):
    """The learner cannot train the model. The message is the reason, as a sentence or the end of one."""


class NotCausal(Untrainable):
    """The model's attention reads later tokens, so no loss on its own tokens has a meaning."""


def why_not(path: Path, quantized: bool = False) -> str | None:
    """Return why the model in a local folder cannot be trained, as the end of a sentence, or None if it can.

    quantized: its weights may be quantized, because a dequantized copy is trained.
    """
    try:
        config = read_config(path)
    except Untrainable as error:
        return str(error)
    text = config.get_text_config()  # differs from `config` in multimodal models only
    if not quantized and is_quantized(config):
        return (
            "its weights are quantized (quantization_config in config.json), and the learner trains unquantized "
            "weights only"
        )
    if any(rope.get("rope_type") == "dynamic" and "alpha" not in rope for rope in _ropes(text)):
        return "its rope_type is dynamic: positions would depend on the longest sequence that is packed with it"
    return None


def layer_kinds(config: Any) -> list[str]:
    """The type of each layer. A model whose configuration lists no types has the same attention in all of them."""
    text = config.get_text_config()
    if text.model_type in STATEFUL:
        return [text.model_type] * text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    return list(kinds or ["full_attention"] * text.num_hidden_layers)


def read_config(path: Path) -> Any:
    """Read transformers' configuration of a local model.

    Raises Untrainable, with the end of a sentence, if transformers cannot read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (*BROKEN, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise Untrainable(
            f"transformers does not support the model that its config.json describes ({reason})"
        ) from None


def is_quantized(config: Any) -> bool:
    """Whether transformers' configuration of a model, or its text part, has a quantization_config."""
    return any(getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))


def longest_of_short_rope(path: Path) -> int | None:
    """Return up to how many tokens a longrope model uses its short factors, or None for other models.

    Beyond that, transformers would choose the factors by the longest sequence of a pack. Engines choose them once, for
    all sequences.
    """
    text = read_config(path).get_text_config()
    limits = [
        int(rope.get("original_max_position_embeddings") or text.original_max_position_embeddings)
        for rope in _ropes(text)
        if rope.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def misfit(loaded: dict[str, Any]) -> str | None:
    """Return what is wrong with a folder's tensors, by transformers' loading info, as the end of a sentence, or None.

    The loading info leaves out tensors that transformers ties, or ignores for the model's class.
    """
    if missing := sorted(loaded["missing_keys"]):
        fault = f"its files lack {_named(missing)}, which config.json describes, so they would be random"
    elif shapes := sorted(loaded["mismatched_keys"]):
        name, has, needs = shapes[0]
        fault = f"{name} has the shape {list(has)} and config.json describes {list(needs)}"
    elif unexpected := sorted(loaded["unexpected_keys"]):
        fault = (
            f"its files hold {_named(unexpected)}, which config.json does not describe, so the model would not use them"
        )
    elif loaded["error_msgs"]:
        fault = f"transformers cannot load its weights ({loaded['error_msgs'][0]})"
    else:
        return None
    return f"{fault}; correct config.json, or download the folder again"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of a model's rotary embeddings: one for all layers, or one for each layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [of_type for of_type in rope.values() if isinstance(of_type, dict)]
