"""`sdft train`: from a checked configuration to a finished, resumable run directory."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from sdft.actors.shared.reason import reason
from sdft.services.analysis.report import write_report
from sdft.services.base.errors import PreflightError, RetentionLost, UserError
from sdft.services.base.files import check_output, takes_no_more, write_atomically
from sdft.services.base.signals import run_until_stopped
from sdft.services.cluster.compat import JOB_FOLDER
from sdft.services.config.load import resolved_yaml
from sdft.services.config.paths import with_absolute_paths
from sdft.services.planning.capacity import check_disk, check_memory
from sdft.services.planning.prefix import check_prefixes
from sdft.services.planning.prepared import Prepared
from sdft.services.records import checkpoints
from sdft.services.records.rows import read_jsonl
from sdft.services.records.run_dir import LOCK, write_state
from sdft.services.training.session import run_session

LOCK_TRIES, LOCK_EVERY_S = 5, 0.1


def train(prepared: Prepared, run_dir: Path, resume: str, console: Console) -> Path | None:
    """Run to the end and return the report's path, None if it could not be written.

    resume: auto, never, or a checkpoint folder. Raises UserError if the run directory or the checkpoint cannot be used.
    """
    if any(part.startswith(JOB_FOLDER) for part in run_dir.resolve().parts):
        raise UserError(
            f"{run_dir} lies in this job's copy of the working directory, which Ray deletes; give an absolute path on "
            f"storage that every node sees: --run-dir /…/{run_dir.name}"
        )
    if resume not in ("auto", "never") and (damage := checkpoints.damage(Path(resume))) is not None:
        raise UserError(f"--resume {resume}: this checkpoint cannot be used: {damage}")
    check_memory(prepared.config, prepared.plan)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--run-dir {run_dir}: the folder cannot be created ({reason(error)}); name another folder"
        ) from None
    with _only_one(run_dir):
        start = _starting_point(prepared, run_dir, resume, console)
        if resume == "never" and ((run_dir / "metrics.jsonl").exists() or checkpoints.folders(run_dir)):
            raise UserError(f"{run_dir} holds a run already; name another --run-dir, or resume it with --resume auto")
        first = checkpoints.read_state(start).step if start else 0
        if start is not None:
            for note in checkpoints.set_aside(run_dir, first):
                console.print(note, soft_wrap=True)
        check_disk(prepared, run_dir)
        total = prepared.schedule.total_steps
        if total is not None and first >= total and not _unevaluated(prepared, run_dir, first):
            console.print(f"{run_dir}: all {total} steps are done already", soft_wrap=True)
            return _ended(run_dir, _finished_after_all(run_dir), console)
        check_output(checkpoints.folder_of(run_dir, total or first + 1))
        config = with_absolute_paths(prepared.config, prepared.path.parent)
        state: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "state": "running",
            "error": None,
            "started": time.time(),
        } | _length(prepared)
        stopped = state | {"state": "failed", "error": "stopped by a signal"}
        try:
            write_atomically(run_dir / "config.yaml", resolved_yaml(config).encode())
            write_state(run_dir, state)
            run_until_stopped(run_session(prepared, run_dir, start, console), lambda: write_state(run_dir, stopped))
        except KeyboardInterrupt:
            write_state(run_dir, stopped)
            raise
        except RetentionLost as error:
            write_state(run_dir, state | {"state": "guarded", "error": str(error)})
            raise
        except BaseException as error:
            with suppress(OSError):  # without this record `sdft status` still detects that the process is gone
                write_state(run_dir, state | {"state": "failed", "error": f"{type(error).__name__}: {error}"})
            if takes_no_more(error):
                raise PreflightError(
                    f"{run_dir}: the disk takes no more ({reason(error)}); free space or repair the disk, and repeat "
                    f"the command to resume from the last checkpoint"
                ) from error
            raise
        return _ended(run_dir, state | {"state": "finished"} | _length(prepared), console)


def _length(prepared: Prepared) -> dict[str, Any]:
    """Return the entries of run.json about the run's length, as far as it is known now."""
    stages = [(stage.name, stage.schedule.last) for stage in prepared.stages]
    return {"total_steps": prepared.schedule.total_steps, "stages": stages}


def _unevaluated(prepared: Prepared, run_dir: Path, last: int) -> bool:
    """Return whether the evaluation at the last step is missing: the source was closed while the run was stopped."""
    if not prepared.stages[-1].source.grows:
        return False
    evaluated = {row["task"] for row in read_jsonl(run_dir / "eval.jsonl") if row["step"] == last}
    return any(s.settings.name not in evaluated for s in prepared.sets)


def _ended(run_dir: Path, state: dict[str, Any] | None, console: Console) -> Path | None:
    """Write run.json and the report of a run whose last checkpoint is saved. A failure is printed, not raised."""
    try:
        if state is not None:
            write_state(run_dir, state)
        return write_report(run_dir)
    except (OSError, UserError) as error:
        console.print(
            f"{run_dir}: all steps are done and saved, but run.json or the report could not be written "
            f"({reason(error)}); the same command writes them later",
            soft_wrap=True,
        )
        return None


def _finished_after_all(run_dir: Path) -> dict[str, Any] | None:
    """Return run.json of a run whose steps are all done, with its state set to finished.

    A run killed between its last checkpoint and its end has another state there. None if there is no run.json, or the
    retention guard has ended the run.
    """
    if not (run_dir / "run.json").exists():
        return None
    state: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return None if state["state"] == "guarded" else state | {"state": "finished", "error": None}


def _starting_point(prepared: Prepared, run_dir: Path, resume: str, console: Console) -> Path | None:
    """Return the checkpoint to resume from, None to start anew. Raises UserError if none of them can be used."""
    if resume == "never":
        return None
    if resume == "auto":
        folder, notes = checkpoints.newest_usable(run_dir)
        for note in notes:
            console.print(note, soft_wrap=True)
        if folder is None:
            return None
    else:
        folder = Path(resume)
    state = checkpoints.read_state(folder)
    if state.dtype != prepared.config.dtype:
        raise UserError(
            f"{folder} belongs to a run in {state.dtype}, and this one is in {prepared.config.dtype}; set "
            f"dtype: {state.dtype} to continue it, or name another --run-dir to begin a new run"
        )
    if not prepared.schedule.has(state.step) or state.fingerprint != prepared.at(state.step).fingerprint:
        raise UserError(
            f"{folder} belongs to a run with another configuration or other data; use the configuration in "
            f"{folder.parent.parent / 'config.yaml'}, or name another --run-dir to begin a new run"
        )
    check_prefixes(prepared.schedule.stages, folder / checkpoints.LEDGER)
    learner = prepared.config.learner
    zero_stage = learner.zero_stage_for(state.dtype)
    if (state.ranks, state.zero_stage) != (learner.ranks, zero_stage):
        console.print(
            f"{folder} was saved by {state.ranks} learner rank(s) at ZeRO stage {state.zero_stage}; the run continues "
            f"with {learner.ranks} at stage {zero_stage}, and its results are the same up to rounding",
            soft_wrap=True,
        )
    return folder


@contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Hold the run directory's lock. The kernel releases it when this process ends for any reason."""
    try:
        file = (run_dir / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"{run_dir}: no file can be written there ({reason(error)}); make the folder writable, or name another "
            f"--run-dir"
        ) from None
    with file:
        _lock(file, run_dir)
        yield


def _lock(file: IO[str], run_dir: Path) -> None:
    """Take the lock, in a few tries, because `sdft status` holds it for a moment."""
    for left in reversed(range(LOCK_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise UserError(
                    f"{run_dir}: another process is training in this folder; name another --run-dir"
                ) from None
        except OSError as error:
            raise PreflightError(
                f"{run_dir}: its file system does not support locks ({reason(error)}), so two processes could train "
                f"there at once; name a --run-dir on another file system"
            ) from None
        time.sleep(LOCK_EVERY_S)
