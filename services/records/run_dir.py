"""The state, the stages and the samples by state of a run, read from its run directory."""

import fcntl
import json
import socket
import sqlite3
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdft.services.base.errors import UserError
from sdft.services.base.files import write_atomically
from sdft.services.records.ledger_reading import ledger_rows

SAMPLE_STATES = ("issued", "sampled", "scored", "trained", "dropped")  # states of the ledger, in order
NO_END = sys.maxsize
LOCK = ".lock"  # held by the process that trains
RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl", "eval.jsonl", "ledger.sqlite")


@dataclass(frozen=True)
class RunState:
    """The state of a run. text: for display. total_steps, error: None if the run has not written them."""

    status: Literal["new", "running", "finished", "failed", "stopped"]
    text: str
    total_steps: int | None
    error: str | None


def check_run_dir(run_dir: Path) -> None:
    """Raise UserError unless a run has begun in this folder."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such folder; give the run directory that `sdft train` printed")
    if not any((run_dir / name).exists() for name in RUN_FILES):
        raise UserError(f"{run_dir}: no run in this folder (it has none of {', '.join(RUN_FILES)})")


def read_stages(run_dir: Path) -> list[tuple[str, int]]:
    """Return the name and last step of each stage, [] for a run without stages.

    A stage whose source is not closed may have no last step yet; it gets NO_END.
    """
    path = run_dir / "run.json"
    stages = json.loads(path.read_text()).get("stages", []) if path.exists() else []
    return [(name, NO_END if last is None else last) for name, last in stages if name]


def read_state(run_dir: Path) -> RunState:
    """Return the state in run.json. A run recorded as running on this host whose lock is free was stopped."""
    path, held = run_dir / "run.json", is_held(run_dir)  # checked before the read: an ending run writes, then unlocks
    if not path.exists():
        return RunState("new", "state unknown (no run.json)", None, None)
    try:
        run = json.loads(path.read_text())
        state, pid, host = run["state"], run["pid"], run["host"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not the state of a run ({error!r}); remove the file") from error
    total, error_text = run.get("total_steps"), run.get("error")
    if state == "finished":
        return RunState("finished", "finished", total, None)
    if state == "guarded":
        return RunState("stopped", "ended by its retention guard", total, error_text)
    if state == "failed":
        return RunState("failed", "failed", total, error_text)
    on_this_host = host == socket.gethostname()
    if held:
        return RunState("running", f"running (pid {pid}{'' if on_this_host else f' on {host}'})", total, None)
    if on_this_host:
        return RunState("stopped", "stopped (killed)", total, None)
    # Some shared file systems do not show one host the locks of another.
    return RunState("running", f"running (pid {pid} on {host}; not seen from this host)", total, None)


def is_held(run_dir: Path) -> bool:
    """Return whether a process, on this host or visibly on another, holds the run's lock."""
    try:
        with (run_dir / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def read_ledger(run_dir: Path) -> dict[str, int]:
    """Return the number of samples in each state, {} if there is no ledger."""
    counts = {state: lengths.total() for state, lengths in read_lengths(run_dir).items()}
    return {state: counts[state] for state in dict.fromkeys([*SAMPLE_STATES, *counts]) if state in counts}


def read_lengths(run_dir: Path) -> "dict[str, Counter[int | None]]":
    """Return, for each state, the number of samples by completion length in tokens; None: not sampled yet.

    Raises UserError if it cannot be read.
    """
    lengths: dict[str, Counter[int | None]] = {}
    try:
        query = "SELECT state, tokens, COUNT(*) FROM samples GROUP BY state, tokens"
        for state, tokens, count in ledger_rows(run_dir, query):
            lengths.setdefault(state, Counter())[tokens] = count
    except sqlite3.Error as error:
        raise UserError(f"{run_dir / 'ledger.sqlite'}: the ledger cannot be read ({error})") from error
    return lengths


def write_state(run_dir: Path, state: dict[str, Any]) -> None:
    write_atomically(run_dir / "run.json", json.dumps(state, indent=2).encode())
