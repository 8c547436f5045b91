"""Check whether a folder's tensors are those that its model needs, and whether the learner can run it. Reads no weight.

    python -m sdft.learner.model.examine FOLDER [--trains]     prints the reason why not, as JSON; null if there is none

transformers loads the folder with its usual code, but from the headers of its files and onto torch's meta device, which
allocates no memory. So its own rules decide which tensors are renamed, tied or ignored. A packed forward on the same
device shows which arguments the model's layers pass to the learner's attention.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft.actors.shared.model_files import read_header, weight_files
from sdft.actors.shared.process import large_imports

with large_imports():
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

    from sdft.learner.model.architecture import BROKEN, Untrainable, is_quantized, misfit, read_config
    from sdft.learner.model.attention import packed_attention
    from sdft.learner.model.student import hidden_states

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LENGTHS = (3, 2)
COUNTED = "sdft_examined"


def examine(path: Path, trains: bool) -> str | None:
    """Return why a model folder's weights cannot be used, or with `trains` not be trained, or None if they can.

    The reason is the end of a sentence, and includes the remedy. Raises ValueError if the files are not whole.
    """
    tensors = {
        name: torch.empty(entry["shape"], dtype=DTYPES.get(entry["dtype"], torch.uint8), device="meta")
        for file in weight_files(path)
        for name, entry in read_header(file)[0].items()
    }
    try:
        config = read_config(path)
        if not trains and is_quantized(config):
            return None  # engines load quantized weights
        _, loaded = _loaded(config, tensors, "eager")
    except Untrainable as error:
        return str(error) if trains else None  # engines have their own model code
    except BROKEN as error:
        return (
            f"transformers cannot build the model that its config.json describes ({_words(error)})" if trains else None
        )
    reason = misfit(loaded)
    if reason is None and trains and (unsupported := _packed(config, tensors)):
        reason = f"{unsupported}; choose another model"
    return reason


def _loaded(config: Any, tensors: dict[str, torch.Tensor], attention: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    with torch.device("meta"):  # only for its class, and its part of a multimodal configuration
        empty = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    loaded: tuple[PreTrainedModel, dict[str, Any]] = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=dict(tensors),
        device_map={"": "meta"},
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported in the loading info instead of raised
    )
    return loaded


def _packed(config: Any, tensors: dict[str, torch.Tensor]) -> str | None:
    """Return why the learner's attention does not cover all that the model's layers do to mix tokens, or None."""
    windows: list[int | None] = []  # sliding_window of each attention call

    def counted(*given: Any, **named: Any) -> tuple[torch.Tensor, None]:
        windows.append(named.get("sliding_window"))
        return packed_attention(*given, **named)

    AttentionInterface.register(COUNTED, counted)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    ids = torch.zeros_like(positions, device="meta")
    try:
        model, _ = _loaded(config, tensors, COUNTED)
        with torch.no_grad():
            hidden_states(model, ids, positions.to("meta"), LENGTHS, ids[:1])
    except Untrainable as error:
        return str(error)
    except BROKEN as error:
        return f"its layers do not work with the learner's attention ({_words(error)})"
    except RuntimeError:
        return None  # an operation needs memory; the learner compares its forward with the model's own at its start
    text = model.config.get_text_config()
    if len(windows) < text.num_hidden_layers:
        return (
            "its layers do not use the attention interface of transformers, which the learner needs for packed "
            "sequences"
        )
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    if getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True):
        limited = sum(window is not None for window in windows)
        if limited < kinds.count("sliding_attention"):
            return "its layers do not pass the window (sliding_window) to their attention"
    return None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)


def main(arguments: Sequence[str]) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it would log what is printed here
    print(json.dumps(examine(Path(arguments[0]), "--trains" in arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
