"""The folder that is trained, if it is not the model's own: a copy that is made once, in the cache.

quantized weights    a copy without quantization
multimodal model     its text part; `sdft export` puts the other parts back
"""

from dataclasses import dataclass
from pathlib import Path

import xxhash

from sdft.actors.shared.model_files import COMPRESSED_TENSORS, FP8, MXFP4, quantization, read_json
from sdft.actors.shared.process import scratch_folder
from sdft.services.base.errors import UserError
from sdft.services.planning.apart import answer, start
from sdft.services.planning.models import CACHE, cache_folder, check_trainable

UNDONE = (FP8, MXFP4, COMPRESSED_TENSORS)
# What writes a folder without quantization, of methods that need packages which sdft does not install.
TOOLS = {
    "gptq": ("GPTQ", "GPTQModel"),
    "awq": ("AWQ", "GPTQModel"),
    "bitsandbytes": ("bitsandbytes", "transformers (model.dequantize(), then save_pretrained)"),
    "torchao": ("torchao", "torchao"),
}


@dataclass(frozen=True)
class Derived:
    """A model folder that learner and engines use."""

    folder: Path
    notes: tuple[str, ...] = ()  # why it is not the folder that the user named, one sentence each


def derived(model: Path, device: str, dtype: str, trains: bool) -> Derived:
    """Return the folder to use for a model. trains: False leaves quantized weights as they are, for engines.

    UserError if its weights are quantized in a way that cannot be undone here, it is multimodal and has no text part
    that can be used, or the copy cannot be written.
    """
    notes, given = [], model
    if trains and (whole := _dequantized(model, device, dtype)) != model:
        notes.append(f"the weights in {model} are quantized; the run begins with their dequantized copy in {whole}")
        model = whole
    if _is_multimodal(model):
        if trains:
            check_trainable(model, device, dtype)
        elif quantization(model) is not None:
            raise UserError(
                f"model: {model} is multimodal and quantized, and cannot be evaluated here; name an exported model, or "
                f"the model that it was made from"
            )
        text = _copy(given, model, "text", "sdft.learner.weights.text_part", "has no text part that can be used here")
        verb = "trains" if trains else "evaluates"
        after = "; `sdft export` puts the others back" if trains else ""
        notes.append(f"{model} is multimodal; the run {verb} its text part, in {text}{after}")
        model = text
    return Derived(model, tuple(notes))


def _is_multimodal(model: Path) -> bool:
    try:
        return isinstance(read_json(model / "config.json").get("text_config"), dict)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def _dequantized(model: Path, device: str, dtype: str) -> Path:
    """Return the folder itself, or its dequantized copy."""
    try:
        settings = quantization(model)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    if settings is None:
        return model
    method = _method(settings)
    if method not in UNDONE:
        name, tool = TOOLS.get(method, (method, "the tool that quantized it"))
        raise UserError(
            f"model: {model} cannot be trained here: its weights are quantized with {name} (quantization_config in "
            f"config.json), and only {', '.join(UNDONE[:-1])} and {UNDONE[-1]} are dequantized here; name the model "
            f"that it was made from, or write it without quantization with {tool}"
        )
    check_trainable(model, device, dtype, quantized=True)
    return _copy(model, model, "dequantized", "sdft.learner.weights.dequantize", "cannot be dequantized")


def _method(settings: dict[str, object]) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):  # older files of bitsandbytes name no method
        return "bitsandbytes"
    return str(settings.get("quant_method", "a method that it does not name"))


def _copy(given: Path, model: Path, kind: str, module: str, failed: str) -> Path:
    """Return the copy of a kind that `module` makes of a model. It appears whole or not at all.

    given: the folder that the user named. It gives the copy its name, so that a copy that was removed comes back under
    the same name.
    """
    out = cache_folder() / kind / f"{given.name}-{_digest(given)}"
    if out.is_dir():
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder("part-", str(out.parent)) as part:
            with start(module, str(model), str(part / "model")) as process:
                reason = answer(process)
            if reason["disk"]:
                raise UserError(f"{CACHE}: {reason['disk']}; free disk space, or name another folder")
            if reason["fault"]:
                mend = "name the model that it was made from" if kind == "dequantized" else "choose another model"
                raise UserError(f"model: {given} {failed}: {reason['fault']}; {mend}")
            try:
                (part / "model").rename(out)
            except OSError:
                if not out.is_dir():  # otherwise another process has made the same copy meanwhile
                    raise
    except OSError as error:
        raise UserError(
            f"{CACHE} {out}: a copy of the model cannot be written there ({error.strerror}); name another folder"
        ) from None
    return out


def _digest(model: Path) -> str:
    """Return a digest of the folder's place and of the sizes and times of its files."""
    stats = [(path.name, path.stat()) for path in sorted(model.iterdir()) if path.is_file()]
    files = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
    return xxhash.xxh3_64_hexdigest(repr((str(model), files)).encode())
