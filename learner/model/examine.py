"""Check whether a folder's tensors are those that its model needs, and whether the learner can run it. Reads no weight.

    python -m sdft.learner.model.examine FOLDER [--trains]     prints an Examination as JSON

transformers loads the folder with its usual code, but from the headers of its files and onto torch's meta device, which
allocates no memory. So its own rules decide which tensors are renamed, tied or ignored. A packed forward on the same
device shows whether the learner's attention keeps the sequences of a pack apart (forward.py).
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdft.actors.shared.model_files import read_header, weight_files
from sdft.actors.shared.process import large_imports

with large_imports():
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from sdft.learner.model.architecture import BROKEN, Untrainable, is_quantized, misfit, read_config
    from sdft.learner.model.experts import replayable
    from sdft.learner.model.forward import one_line, shared_by, why_alone
    from sdft.learner.model.mixers import mixers

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


@dataclass(frozen=True)
class Examination:
    """What is found out about a model folder. Texts are ends of a sentence."""

    fault: str | None = None  # why its weights cannot be used, or not be trained, with the remedy
    alone: str | None = None  # why the learner computes the sequences of a pack one by one
    routed: bool = False  # it has experts, and the learner can replay their choice
    divides: bool = False  # some layers compute the sequences of a pack one by one
    shared_by: tuple[int, ...] = (1,)  # numbers of ranks that can divide the tokens of a pack


def examine(path: Path, trains: bool) -> Examination:
    """Examine a model folder: whether its weights can be used, or with `trains` be trained.

    Raises ValueError if the files are not whole.
    """
    tensors = {
        name: torch.empty(entry["shape"], dtype=DTYPES.get(entry["dtype"], torch.uint8), device="meta")
        for file in weight_files(path)
        for name, entry in read_header(file)[0].items()
    }
    try:
        config = read_config(path)
        if not trains and is_quantized(config):
            return Examination()  # engines load quantized weights
        alone = why_alone(config) if trains else None
        model, loaded = _loaded(config, tensors, "eager")
    except Untrainable as error:
        return Examination(str(error) if trains else None)  # engines have their own model code
    except BROKEN as error:
        fault = f"transformers cannot build the model that its config.json describes ({one_line(error)})"
        return Examination(fault if trains else None)
    if not trains:
        return Examination(misfit(loaded))
    routed, divides = alone is None and bool(replayable(model)), bool(alone or mixers(model))
    return Examination(misfit(loaded), alone, routed, divides, (1,) if divides else shared_by(config))


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


def main(arguments: Sequence[str]) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it would log what is printed here
    print(json.dumps(asdict(examine(Path(arguments[0]), "--trains" in arguments))))


if __name__ == "__main__":
    main(sys.argv[1:])
