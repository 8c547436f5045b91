"""Checkpoints: one folder with all that a resumed run needs, either whole or absent.

A checkpoint is written under a hidden name, closed with a manifest of every file's size and digest, flushed to disk,
then renamed. `latest` and resume use only folders whose manifest matches the files. A damaged checkpoint is renamed
when a run resumes from an earlier one, and never counts against `checkpoint.keep`.
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

from sdft.services.base.digests import digest
from sdft.services.base.errors import PreflightError, UserError
from sdft.services.base.files import write_atomically

MANIFEST = "manifest.json"
STATE = "state.json"
LEDGER = "ledger.sqlite"
PART = ".part-"  # prefix of a folder that is no checkpoint: incomplete, or about to be removed


@dataclass(frozen=True)
class CheckpointState:
    """The controller's part of a checkpoint, beside the learner's own state."""

    step: int
    ranks: int  # learner ranks that wrote it
    zero_stage: int
    dtype: str
    fingerprint: str  # of configuration and data
    begun: str | None = None  # the driver's local time at the run's first start, ISO 8601: prompts may contain it


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def begin(run_dir: Path, step: int) -> Path:
    """Make an empty folder for the checkpoint of `step`. Leftovers of a killed writer are removed."""
    remove_parts(run_dir)
    folder = run_dir / "checkpoints" / f"{PART}{folder_of(run_dir, step).name}"
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir()
    return folder


def remove_parts(run_dir: Path) -> None:
    """Remove incomplete folders. A folder that cannot be removed (NFS keeps a file open) stays until the next call."""
    for left in (run_dir / "checkpoints").glob(f"{PART}*"):
        shutil.rmtree(left, ignore_errors=True)


def commit(
    part: Path, run_dir: Path, state: CheckpointState, keep: int, held: int | None = None
) -> tuple[Path, list[str]]:
    """Make the written folder a checkpoint, and prune older ones.

    The newest `keep` checkpoints stay, and the newest one up to step `held`, because the retention guard may roll back
    to it. Returns the checkpoint's folder and notes for the user. Raises OSError if the checkpoint could not be made;
    nothing has changed then. A failure after the rename is returned as a note.
    """
    (part / STATE).write_text(json.dumps(vars(state), indent=2))
    files = sorted(p for p in part.rglob("*") if p.is_file())
    entries = {str(p.relative_to(part)): {"bytes": p.stat().st_size, "xxh3_128": digest(p)} for p in files}
    (part / MANIFEST).write_text(json.dumps({"step": state.step, "files": entries}, indent=2))
    for path in [*files, part / MANIFEST, *(p for p in part.rglob("*") if p.is_dir()), part]:
        _sync(path)
    final = folder_of(run_dir, state.step)
    if final.exists():  # a damaged checkpoint
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
    """Remove the checkpoints up to step `newest`, except the last `keep` and the last one up to step `held`.

    Later steps do not count: such a checkpoint is damaged, or the run resumed from an earlier one.
    """
    steps = {step: folder for step, folder in folders(run_dir).items() if step <= newest}
    good = [step for step in steps if held is not None and step <= held][-1:]
    for old in list(steps)[:-keep]:
        if old not in good:
            # Renamed first, because an interrupted removal would leave a checkpoint that looks damaged.
            shutil.rmtree(steps[old].rename(steps[old].with_name(f"{PART}old-{steps[old].name}")))


def folders(run_dir: Path) -> dict[int, Path]:
    """Return every checkpoint folder by step, in numerical order (by name, step-1000000 would come first).

    Raises PreflightError if the folder of checkpoints cannot be read.
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
    """Rename the checkpoints of steps later than `after`, the step that the run resumes from.

    The run had come further, or its later checkpoints are damaged. The highest step would count as the newest. Returns
    a note for each renamed checkpoint. Raises UserError if the folder of checkpoints cannot be changed.
    """
    notes, steps = [], folders(run_dir)
    root = run_dir / "checkpoints"
    try:
        for step, folder in steps.items():
            if step > after:
                aside = folder.with_name(f"aside-{time.strftime('%Y%m%d-%H%M%S')}-{folder.name}")
                folder.rename(aside)
                notes.append(f"the checkpoint of step {step} is set aside as {aside}")
        if notes:
            left = [folder.name for step, folder in steps.items() if step <= after]
            if left:
                write_atomically(root / "latest", left[-1].encode())
            else:
                (root / "latest").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{root}: the checkpoints after step {after} cannot be set aside ({error}); make the folder and the "
            f"checkpoints in it writable, or name another --run-dir"
        ) from error
    return notes


def damage(folder: Path) -> str | None:
    """Return why a checkpoint is damaged, or None if every file is as it was written.

    Raises PreflightError if a file cannot be read, because its content may still be right.
    """
    with _readable(folder):
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            files = {str(name): (entry["bytes"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
        except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError, AttributeError) as error:
            return f"its {MANIFEST} cannot be read ({error})"
        for name, (size, value) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or digest(path) != value:
                return f"{name} is not as it was written"
    return None


def newest(run_dir: Path, before: int | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint (of a step before `before`), and a note for each damaged one skipped."""
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
    """Return newest() of all steps; None only if there is no checkpoint. Raises UserError if all are damaged."""
    folder, notes = newest(run_dir)
    if folder is None and notes:
        raise UserError(
            f"{'; '.join(notes)}: none of the run's checkpoints can be used; restore their files, name another "
            f"checkpoint with --resume PATH, or start a new run with another --run-dir"
        )
    return folder, notes


def read_state(folder: Path) -> CheckpointState:
    return CheckpointState(**json.loads((folder / STATE).read_text()))


def begun(run_dir: Path, resume: str) -> datetime | None:
    """Return the first start of the run that `resume` (auto, never, or a checkpoint folder) continues.

    None if no run is continued, or no checkpoint holds the time.
    """
    places = [] if resume == "never" else list(reversed(folders(run_dir).values()))
    for folder in places if resume in ("auto", "never") else [Path(resume)]:
        try:
            if (said := read_state(folder).begun) is not None:
                return datetime.fromisoformat(said)
        except (OSError, ValueError, TypeError):
            continue  # a damaged checkpoint: digests are compared when the run resumes
    return None


@contextmanager
def _readable(what: Path) -> Iterator[None]:
    """Convert an OSError of the disk or the network, which may be temporary, into a PreflightError."""
    try:
        yield
    except OSError as error:
        raise PreflightError(
            f"{error.filename or what} cannot be read ({error.strerror or error}); fix the disk or the permissions "
            f"and run the same command again, or name an earlier checkpoint with --resume PATH"
        ) from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
