"""Checkpoints: one folder with everything, whole or not there at all.

Written under a hidden name, closed with a manifest of every file's size and digest, flushed to disk, then renamed.
`latest` and resume see only folders with a manifest that holds. A damaged checkpoint is renamed when a run goes on from
an earlier one, and never counts against `checkpoint.keep`.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import xxhash

from sdft.services.base.errors import PreflightError, UserError
from sdft.services.base.files import write_atomically

MANIFEST = "manifest.json"
STATE = "state.json"
LEDGER = "ledger.sqlite"
PART = ".part-"  # begins the name of a folder that is no checkpoint: not one yet, or to be removed


@dataclass(frozen=True)
class CheckpointState:
    """What the controller adds to the learner's own state."""

    step: int
    ranks: int  # learner ranks that wrote it
    zero_stage: int
    dtype: str
    fingerprint: str  # of configuration and data
    begun: str | None = None  # the driver's local time when the run was begun, ISO 8601: prompts may have it in them


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def begin(run_dir: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; leftovers of a killed writer are removed."""
    remove_parts(run_dir)
    folder = run_dir / "checkpoints" / f"{PART}{folder_of(run_dir, step).name}"
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir()
    return folder


def remove_parts(run_dir: Path) -> None:
    """Remove what is no checkpoint. What cannot be removed (a file that NFS keeps open) stays for another time."""
    for left in (run_dir / "checkpoints").glob(f"{PART}*"):
        shutil.rmtree(left, ignore_errors=True)


def commit(
    part: Path, run_dir: Path, state: CheckpointState, keep: int, held: int | None = None
) -> tuple[Path, list[str]]:
    """Make the written folder a checkpoint and remove all older ones but the newest `keep`, and the newest of those up
    to step `held`, to which the retention guard may have to go back.

    Returns its folder and notes for people. OSError: nothing has changed. What fails once the checkpoint has its name
    is a note.
    """
    (part / STATE).write_text(json.dumps(vars(state), indent=2))
    files = sorted(p for p in part.rglob("*") if p.is_file())
    entries = {str(p.relative_to(part)): {"bytes": p.stat().st_size, "xxh3_128": _digest(p)} for p in files}
    (part / MANIFEST).write_text(json.dumps({"step": state.step, "files": entries}, indent=2))
    for path in [*files, part / MANIFEST, *(p for p in part.rglob("*") if p.is_dir()), part]:
        _sync(path)
    final = folder_of(run_dir, state.step)
    if final.exists():  # a damaged one
        shutil.rmtree(final)
    part.rename(final)
    try:
        _sync(final.parent)
        write_atomically(final.parent / "latest", final.name.encode())
        _prune(run_dir, state.step, keep, held)
    except (OSError, PreflightError) as error:
        return final, [
            f"the checkpoint of step {state.step} is saved, but older ones could not be removed, or `latest` could "
            f"not be written ({error})"
        ]
    return final, []


def _prune(run_dir: Path, newest: int, keep: int, held: int | None) -> None:
    """Of the checkpoints up to step `newest`, leave the last `keep`, and the last one up to step `held`.

    Later steps do not count: such a checkpoint is damaged, or the run went on from an earlier one.
    """
    steps = {step: folder for step, folder in folders(run_dir).items() if step <= newest}
    good = [step for step in steps if held is not None and step <= held][-1:]
    for old in list(steps)[:-keep]:
        if old not in good:
            # Renamed first: a removal that is cut off would leave a checkpoint that looks damaged.
            shutil.rmtree(steps[old].rename(steps[old].with_name(f"{PART}old-{steps[old].name}")))


def folders(run_dir: Path) -> dict[int, Path]:
    """Every checkpoint by its step, in their order: a millionth step is not the first by its name.

    PreflightError if their folder cannot be read.
    """
    root = run_dir / "checkpoints"
    with _readable(root):
        try:
            names = os.listdir(root)
        except (FileNotFoundError, NotADirectoryError):
            names = []
    named = ((name.removeprefix("step-"), root / name) for name in names if name.startswith("step-"))
    return dict(sorted((int(step), folder) for step, folder in named if step.isdigit()))


def set_aside(run_dir: Path, after: int) -> list[str]:
    """Rename the checkpoints of later steps than `after`, from which a run goes on that had come further, or whose
    later ones are damaged: the highest step would count as the newest. Returns a note for each."""
    notes, steps = [], folders(run_dir)
    for step, folder in steps.items():
        if step > after:
            aside = folder.with_name(f"aside-{time.strftime('%Y%m%d-%H%M%S')}-{folder.name}")
            folder.rename(aside)
            notes.append(f"a later checkpoint is kept as {aside}")
    if notes:
        left = [folder.name for step, folder in steps.items() if step <= after]
        latest = run_dir / "checkpoints" / "latest"
        if left:
            write_atomically(latest, left[-1].encode())
        else:
            latest.unlink(missing_ok=True)
    return notes


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as it was written.

    PreflightError if a file cannot be read: that does not tell what is in it.
    """
    with _readable(folder):
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            files = {str(name): (entry["bytes"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
        except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError, AttributeError) as error:
            return f"its {MANIFEST} cannot be read ({error})"
        for name, (size, digest) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _digest(path) != digest:
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
            return folder, [f"{note}; using the one before it" for note in notes]
        notes.append(f"{folder} is damaged ({reason})")
    return None, notes


def newest_usable(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The same, of all steps; None only if there is no checkpoint at all. UserError if there are some, all damaged."""
    folder, notes = newest(run_dir)
    if folder is None and notes:
        raise UserError(
            f"{'; '.join(notes)}: none of the run's checkpoints can be used; restore their files, name another "
            f"checkpoint by --resume PATH, or begin a new run with another --run-dir"
        )
    return folder, notes


def read_state(folder: Path) -> CheckpointState:
    return CheckpointState(**json.loads((folder / STATE).read_text()))


def begun(run_dir: Path, resume: str) -> datetime | None:
    """When the run was begun that `resume` (auto, never, or a checkpoint folder) continues.

    None if it continues no run, or no checkpoint has the time.
    """
    places = [] if resume == "never" else list(reversed(folders(run_dir).values()))
    for folder in places if resume in ("auto", "never") else [Path(resume)]:
        try:
            if (said := read_state(folder).begun) is not None:
                return datetime.fromisoformat(said)
        except (OSError, ValueError, TypeError):
            continue  # a damaged one: digests are compared when the run goes on
    return None


@contextmanager
def _readable(what: Path) -> Iterator[None]:
    """An error of the disk or the network, which may pass, becomes a PreflightError."""
    try:
        yield
    except OSError as error:
        raise PreflightError(
            f"{error.filename or what} cannot be read ({error.strerror or error}); mend the disk or the permissions "
            f"and give the same command again, or name an earlier checkpoint by --resume PATH"
        ) from error


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
