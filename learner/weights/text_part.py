"""The text part of a multimodal model as a model folder of its own, and its return into the whole model.

    multimodal folder                            text part                        after the training
    model.language_model.layers.0...   split     model.layers.0...      trained   model.language_model.layers.0...
    model.vision_tower...              ─────►                 ─────►     join     model.vision_tower..., its own bytes

    python -m sdft.learner.weights.text_part FOLDER OUT     prints why it could not be done, as JSON (export.report)

Learner and engines have the text part, which is a text model like any other. The file ORIGIN in it, which every
checkpoint copies, names the whole model and the names of the weights there.
"""

import json
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.actors.shared.model_files import ORIGIN, QUANTIZATION, read_header, read_json, weight_files
from sdft.actors.shared.process import large_imports
from sdft.learner.model.architecture import BROKEN, Untrainable, read_config

with large_imports():
    import torch
    from safetensors import safe_open
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    from sdft.learner.checkpoint.saving import TensorFile
    from sdft.learner.weights.export import FORMAT, copy_companions, report, write_index

# Names of the text part's weights in a multimodal folder. transformers has written the first two forms.
NAMES = re.compile(r"(?:model\.language_model|language_model\.model|language_model)\.(?P<name>.+)")
HEAD = re.compile(r"(?:language_model\.)?(?P<name>lm_head\..+)")
FROM_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id")  # settings that text_config may leave to the whole
NAMES_KEY, FOLDER_KEY = "names", "folder"


class WholeGone(Exception):
    """The multimodal folder of a text part is not there any more, or has changed."""


@dataclass(frozen=True)
class Origin:
    """Where a text part comes from."""

    folder: Path  # of the whole model
    names: Mapping[str, str]  # name in the whole model's files, by the name in the text part

    @classmethod
    def of(cls, folder: Path) -> "Origin":
        """The origin that the folder of a text part names."""
        content = read_json(folder / ORIGIN)
        return cls(Path(content[FOLDER_KEY]), content[NAMES_KEY])


def text_name(name: str) -> str | None:
    """The name in the text part of a weight of the whole model, or None if it belongs to another part."""
    if head := HEAD.fullmatch(name):
        return head["name"]
    found = NAMES.fullmatch(name)
    return f"model.{found['name']}" if found else None


def split(whole: Path, out: Path) -> None:
    """Write the text part of a multimodal folder as the folder `out`, which must not exist.

    Raises ValueError if it has none that transformers can load.
    """
    held = {name: path for path in weight_files(whole) for name in read_header(path)[0]}
    names = {new: name for name in held if (new := text_name(name)) is not None}
    if not any(NAMES.fullmatch(name) and not HEAD.fullmatch(name) for name in held):
        raise ValueError("its files have no weight whose name begins with model.language_model or language_model")
    config = _text_config(whole, _may_be_tied(held, names))
    sizes: dict[str, dict[str, int]] = {}
    out.mkdir(parents=True)
    for path in weight_files(whole):
        with safe_open(path, framework="pt") as file:
            tensors = {new: file.get_tensor(name) for new, name in names.items() if held[name] == path}
        if tensors:
            TensorFile(out / path.name, tensors, FORMAT).write()
            sizes[path.name] = {name: tensor.nbytes for name, tensor in tensors.items()}
    copy_companions(whole, out, torch.float32)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_index(whole, out, sizes)
    (out / ORIGIN).write_text(json.dumps({FOLDER_KEY: str(whole), NAMES_KEY: names}) + "\n")


def _may_be_tied(held: Mapping[str, Path], names: Mapping[str, str]) -> bool:
    """Whether the files have no head, or one that equals the embedding.

    held: the file of each weight. names: of the weights there, by the name in the text part.
    """

    def weight(name: str) -> torch.Tensor | None:
        if name not in names:
            return None
        with safe_open(held[names[name]], framework="pt") as file:
            return file.get_tensor(names[name])

    head, embedding = weight("lm_head.weight"), weight("model.embed_tokens.weight")
    return head is None or (embedding is not None and torch.equal(head, embedding))


def _text_config(whole: Path, may_be_tied: bool) -> dict[str, Any]:
    """The content of config.json for the text part. may_be_tied: its head may be its embedding."""
    try:
        config = read_config(whole)
    except Untrainable as error:
        raise ValueError(str(error)) from None
    text = config.get_text_config()
    architecture = CAUSAL.get(text.model_type)
    if architecture is None:
        raise ValueError(f"transformers has no text model of the type {text.model_type}, of which its text part is")
    given, found = read_json(whole / "config.json"), json.loads(text.to_json_string(use_diff=False))
    for key in FROM_WHOLE:
        if found.get(key) is None and getattr(config, key, None) is not None:
            found[key] = getattr(config, key)
    dtype = given.get("dtype") or given.get("torch_dtype") or found.get("dtype")
    kept = {key: given[key] for key in QUANTIZATION if given.get(key)}
    # Folders have the setting in one of two places, and transformers' default for the other may be wrong.
    tied = may_be_tied and any(getattr(part, "tie_word_embeddings", False) for part in (config, text))
    return found | kept | {"architectures": [architecture], "tie_word_embeddings": tied, "dtype": dtype}


def join(student: Path, origin: Origin, out: Path) -> None:
    """Write the whole model with a trained text part as the folder `out`, which must not exist.

    The other parts have the bytes of the original. Raises WholeGone if the original is not whole.
    """
    whole = origin.folder
    if not whole.is_dir():
        raise WholeGone(f"{whole} does not exist")
    try:
        files = {path: list(read_header(path)[0]) for path in weight_files(whole)}
        read_json(whole / "config.json")
    except ValueError as error:
        raise WholeGone(str(error)) from None
    stored = {name for names in files.values() for name in names}
    if absent := sorted(set(origin.names.values()) - stored):
        raise WholeGone(f"{whole} has no weight {absent[0]} any more")
    by_original = {original: name for name, original in origin.names.items()}
    out.mkdir(parents=True)
    sizes: dict[str, dict[str, int]] = {}
    dtype = torch.float32
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(student)]
        trained = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        for path, names in files.items():
            tensors = {}
            with safe_open(path, framework="pt") as file:
                for name in names:
                    if name in by_original:
                        tensors[name] = trained[by_original[name]].get_tensor(by_original[name])
                        dtype = tensors[name].dtype
                    else:
                        tensors[name] = file.get_tensor(name)
            TensorFile(out / path.name, tensors, FORMAT).write()
            sizes[path.name] = {name: tensor.nbytes for name, tensor in tensors.items()}
    copy_companions(whole, out, dtype)
    write_index(whole, out, sizes)
    config = read_json(out / "config.json")
    for key in ("dtype", "torch_dtype"):
        if key in config["text_config"]:
            config["text_config"][key] = config["dtype"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def why_not(whole: Path, out: Path) -> str | None:
    """Split, and return why it failed, as the end of a sentence, or None."""
    try:
        split(whole, out)
    except ValueError as error:
        return str(error)
    except BROKEN as error:
        return f"its files do not fit its config.json ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


if __name__ == "__main__":
    report(why_not, sys.argv[1:])
