"""Resolve a model to a local folder: an existing one, a built-in model made from its package, or one from the hub."""

import difflib
import os
import shutil
import tempfile
from pathlib import Path

from sdft.actors.shared.model_files import COMPANIONS, INDEX, read_json
from sdft.actors.shared.process import large_imports
from sdft.learner.model.architecture import longest_of_short_rope, why_not
from sdft.services.base.errors import UserError, first_line
from sdft.services.base.files import resolve_path
from sdft.services.data.without_torch import import_for_tokenizers
from sdft.services.planning.limits import engine_limit
from sdft.services.planning.shape import check_files
from sdft.services.planning.smollm2 import make_smollm2

BUILT_IN = {"smollm2-135m": make_smollm2}
CACHE = "SDFT_CACHE"  # environment variable: folder of the built-in models, and of what was examined
# File patterns in a hub repository. Subfolders and consolidated files repeat the same weights in other formats.
DOWNLOADED = [*COMPANIONS, "*.safetensors"]
NOT_DOWNLOADED = ["*/*", "consolidated*"]


def resolve_model(name: str, base: Path) -> Path:
    """Return the folder of `name`: a path (relative to `base` or the working directory), a built-in name, a hub id."""
    for candidate in (resolve_path(base, name), Path(name)):
        try:
            if candidate.is_dir():
                return _complete(candidate.resolve())
        except OSError as error:
            raise UserError(f"model: {candidate} cannot be read ({error.strerror}); check its permissions") from None
    if name in BUILT_IN:
        folder = cache_folder() / "models" / name
        if not folder.exists():
            materialise(name, folder, CACHE)
        return _complete(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"built-in models: {', '.join(BUILT_IN)}"
    try:
        return _complete(Path(snapshot_download(name, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model: {name} is neither a folder nor a built-in name, and cannot be downloaded from the hub "
            f"({first_line(error)}); {hint}"
        ) from None


def check_trainable(model: Path, device: str, dtype: str, quantized: bool = False) -> None:
    """UserError unless config.json describes a model that the learner can train and the engines can serve.

    quantized: as in why_not.
    """
    with large_imports(), import_for_tokenizers():
        reason = why_not(model, quantized)
    if reason:
        raise UserError(f"model: {model} cannot be trained here: {reason}; choose another model")
    if limit := engine_limit(read_json(model / "config.json"), device, dtype):
        raise UserError(f"model: {model} cannot be trained here: {limit}")


def check_positions(model: Path, tokens: int) -> None:
    """UserError if sequences of `tokens` tokens exceed the short range of longrope positions.

    Beyond it the positions depend on what else is computed with a sequence.
    """
    limit = longest_of_short_rope(model)
    if limit is not None and tokens > limit:
        raise UserError(
            f"data.max_teacher_prompt_tokens and the longest reply add up to {tokens} tokens, but beyond {limit} the "
            f"model in {model} changes its positions (longrope), and engines and learner change them for different "
            f"sequences; lower data.max_teacher_prompt_tokens or max_new_tokens"
        )


def materialise(name: str, out: Path, setting: str = "--out") -> None:
    """Make a built-in model in the folder `out`, which must be new or empty. The folder appears whole or not at all.

    setting: the option or variable that the errors name. UserError if `name` is not built-in or `out` cannot be used.
    """
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"built-in models: {', '.join(BUILT_IN)}"
        raise UserError(f"{name} is not a built-in model; {hint}")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{setting} {out} exists and is not an empty folder; name a new or empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            _make(name, part / out.name, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{setting} {out}: the model cannot be written there ({reason}); name another folder") from None


def _make(name: str, part: Path, out: Path) -> None:
    part.mkdir()  # default permissions; the temporary parent folder is private to the owner
    BUILT_IN[name](part)
    try:
        part.rename(out)
    except OSError:
        if not out.is_dir() or not any(out.iterdir()):
            raise
        # Another process made the same model first; keep that one.


def cache_folder() -> Path:
    """Return the folder of what is made once. UserError if it needs a home directory and the user has none."""
    try:
        return Path(os.environ.get(CACHE, "~/.cache/sdft")).expanduser()
    except RuntimeError:
        raise UserError(f"this user has no home directory; set {CACHE} to a writable folder") from None


def _complete(folder: Path) -> Path:
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")) and not (folder / INDEX).exists():
        missing.append("*.safetensors")
    if missing:
        raise UserError(f"model: {folder} lacks {', '.join(missing)}; name a complete Hugging Face model folder")
    check_files(folder)
    return folder
