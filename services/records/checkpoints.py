"""Checkpoints: one folder with everything, whole or not there at all.

Written under a hidden name, closed with a manifest of every file's size and digest, flushed to disk, then renamed.
`latest` and resume see only folders with a manifest that holds.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import xxhash

from sdft.services.base.files import write_atomically

MANIFEST = "manifest.json"
STATE = "state.json"
LEDGER = "ledger.sqlite"


@dataclass(frozen=True)
class CheckpointState:
    """What the controller adds to the learner's own state."""

    step: int
    ranks: int  # learner ranks that wrote it
    zero_stage: int
    dtype: str
    fingerprint: str  # of configuration and data


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def begin(run_dir: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; leftovers of a killed writer are removed."""
    root = run_dir / "checkpoints"
    root.mkdir(exist_ok=True)
    for left in root.glob(".part-*"):
        shutil.rmtree(left)
    folder = root / f".part-{folder_of(run_dir, step).name}"
    folder.mkdir()
    return folder


def commit(part: Path, run_dir: Path, state: CheckpointState, keep: int, held: int | None = None) -> Path:
    """Make the written folder the run's newest checkpoint and remove all but the newest `keep`, and the newest of
    those up to step `held`, to which the retention guard may have to go back."""
    (part / STATE).write_text(json.dumps(vars(state), indent=2))
    files = sorted(p for p in part.rglob("*") if p.is_file())
    entries = {str(p.relative_to(part)): {"bytes": p.stat().st_size, "xxh3_128": _digest(p)} for p in files}
    (part / MANIFEST).write_text(json.dumps({"step": state.step, "files": entries}, indent=2))
    for path in [*files, part / MANIFEST, *(p for p in part.rglob("*") if p.is_dir()), part]:
        _sync(path)
    final = folder_of(run_dir, state.step)
    if final.exists():  # a damaged one that resume passed over
        shutil.rmtree(final)
    part.rename(final)
    _sync(final.parent)
    write_atomically(final.parent / "latest", final.name.encode())
    steps = folders(run_dir)
    good = [step for step in steps if held is not None and step <= held][-1:]
    for old in list(steps)[:-keep]:
        if old not in good:
            shutil.rmtree(steps[old])
    return final


def folders(run_dir: Path) -> dict[int, Path]:
    """Every checkpoint by its step, in their order: a millionth step is not the first by its name."""
    named = ((folder.name.removeprefix("step-"), folder) for folder in (run_dir / "checkpoints").glob("step-*"))
    return dict(sorted((int(step), folder) for step, folder in named if step.isdigit()))


def set_aside(run_dir: Path, after: int) -> list[Path]:
    """Rename the checkpoints of later steps than `after`, from which a run goes on that had come further: the highest
    step would count as the newest. Returns their new names."""
    moved = []
    for step, folder in folders(run_dir).items():
        if step > after:
            aside = folder.with_name(f"aside-{time.strftime('%Y%m%d-%H%M%S')}-{folder.name}")
            folder.rename(aside)
            moved.append(aside)
    return moved


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or _digest(path) != entry["xxh3_128"]:
            return f"{name} is not as it was written"
    return None


def newest(run_dir: Path, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint (of a step before `before`), and a sentence for each damaged one passed over."""
    notes: list[str] = []
    for step, folder in reversed(folders(run_dir).items()):
        if before is not None and step >= before:
            continue
        reason = damage(folder)
        if reason is None:
            return folder, notes
        notes.append(f"{folder} is damaged ({reason}); using the one before it")
    return None, notes


def read_state(folder: Path) -> CheckpointState:
    return CheckpointState(**json.loads((folder / STATE).read_text()))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
