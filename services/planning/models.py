"""A model's local folder: an existing one, a built-in model made once from its package, or one from the hub."""

import difflib
import os
import shutil
import tempfile
from pathlib import Path

from sdft.actors.shared.model_files import COMPANIONS, INDEX
from sdft.learner.model.architecture import why_not
from sdft.services.base.errors import UserError
from sdft.services.base.files import resolve_path
from sdft.services.planning.shape import check_files
from sdft.services.planning.smollm2 import make_smollm2

BUILT_IN = {"smollm2-135m": make_smollm2}
# Of a hub repository. Subfolders and consolidated files hold the same weights once more, in other formats.
DOWNLOADED = [*COMPANIONS, "*.safetensors"]
NOT_DOWNLOADED = ["*/*", "consolidated*"]


def resolve_model(name: str, base: Path) -> Path:
    """The folder of `name`: a path (relative to `base` or here), a built-in name, or a hub id."""
    for candidate in (resolve_path(base, name), Path(name)):
        if candidate.is_dir():
            return _complete(candidate.resolve())
    if name in BUILT_IN:
        folder = Path(os.environ.get("SDFT_CACHE", "~/.cache/sdft")).expanduser() / "models" / name
        if not folder.exists():
            materialise(name, folder)
        return _complete(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"built-in models: {', '.join(BUILT_IN)}"
    try:
        return _complete(Path(snapshot_download(name, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise UserError(
            f"model: {name} is no folder and no built-in name, and the hub did not give it ({reason}); {hint}"
        ) from None


def check_trainable(model: Path) -> None:
    """UserError unless the learner can train the model in this folder."""
    if reason := why_not(model):
        raise UserError(f"model: {model} cannot be trained here: {reason}; choose another")


def materialise(name: str, out: Path) -> None:
    """Make a built-in model into the folder `out`, which must be new or empty; whole or not at all."""
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(BUILT_IN)}"
        raise UserError(f"{name} is not a built-in model; {hint}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; name a new or empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be made ({error.strerror}); name another") from None
    try:
        BUILT_IN[name](part)
        part.chmod(0o755)
        try:
            part.rename(out)
        except OSError:
            if not out.is_dir() or not any(out.iterdir()):
                raise
            # Another process made it first: theirs is as good.
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _complete(folder: Path) -> Path:
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")) and not (folder / INDEX).exists():
        missing.append("*.safetensors")
    if missing:
        raise UserError(f"model: {folder} lacks {', '.join(missing)}; it is not a complete Hugging Face model folder")
    check_files(folder)
    return folder
