"""A quantized model as the folder that is trained: a copy without quantization, made once in the cache."""

import shutil
import tempfile
from pathlib import Path

import xxhash

from sdft.actors.shared.model_files import COMPRESSED_TENSORS, FP8, MXFP4, quantization
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


def trainable(model: Path, device: str, dtype: str) -> Path:
    """Return the folder to train a model from: the folder itself, or its dequantized copy in the cache.

    UserError if its weights are quantized in a way that cannot be undone here, or the copy cannot be written.
    """
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
    out = cache_folder() / "dequantized" / f"{model.name}-{_digest(model)}"
    if not out.is_dir():
        _make(model, out)
    return out


def _method(settings: dict[str, object]) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):  # older files of bitsandbytes name no method
        return "bitsandbytes"
    return str(settings.get("quant_method", "a method that it does not name"))


def _make(model: Path, out: Path) -> None:
    """Write the copy. It appears whole or not at all."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(
            f"{CACHE} {out}: a dequantized copy of the model cannot be written there ({error.strerror}); name another "
            f"folder"
        ) from None
    try:
        with start("sdft.learner.weights.dequantize", str(model), str(part / "model")) as process:
            try:
                reason = answer(process)
            except BaseException:
                process.kill()
                raise
        if reason:
            raise UserError(f"model: {model} cannot be dequantized: {reason}; name the model that it was made from")
        if not out.is_dir():  # another process may have made the same copy meanwhile
            (part / "model").rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _digest(model: Path) -> str:
    """Return a digest of the folder's place and of the sizes and times of its files."""
    stats = [(path.name, path.stat()) for path in sorted(model.iterdir()) if path.is_file()]
    files = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
    return xxhash.xxh3_64_hexdigest(repr((str(model), files)).encode())
