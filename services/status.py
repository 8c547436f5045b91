"""What a run directory says about its run (state, evaluation, samples, checkpoints), and `sdft status`'s text of it."""

import json
import os
import socket
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.checkpoint import MANIFEST, folders
from services.errors import UserError
from services.metrics import PERPLEXITY, STUDENT, TEACHER, EvalResult, StepMetrics, percent, read_rows
from services.resolved import read_config
from services.verdict import verdict
from services.watchdog import read_waiting

ENDED = ("trained", "dropped")
SAMPLE_STATES = ("issued", "sampled", "scored", "trained", "dropped")  # the ledger's, in the order of their life
RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl", "eval.jsonl", "ledger.sqlite")


@dataclass(frozen=True)
class RunState:
    """`text` says it to people. `total_steps` and `error` are None where the run has not written them."""

    kind: Literal["new", "running", "finished", "failed", "stopped"]
    text: str
    total_steps: int | None
    error: str | None


@dataclass(frozen=True)
class SetProgress:
    """One evaluation set: the first result, the latest (None while there is no second one) and the teacher's."""

    name: str
    role: str  # task, retention, or "" if the configuration does not name the set
    before: EvalResult | None
    after: EvalResult | None
    teacher: EvalResult | None

    @property
    def change(self) -> str:
        """From before to after, as people read it."""
        if self.before is None:
            return "not evaluated yet"
        if self.after is None:
            return f"{self.before.text} (n {self.before.n})"
        return f"{self.before.text} → {self.after.text.removeprefix('perplexity ')} (n {self.after.n})"


def check_run_dir(run_dir: Path) -> None:
    """UserError unless a run has begun in this folder."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such folder; give the run directory that `sdft train` printed")
    if not any((run_dir / name).exists() for name in RUN_FILES):
        raise UserError(f"{run_dir}: no run in this folder (it has none of {', '.join(RUN_FILES)})")


def read_stages(run_dir: Path) -> list[tuple[str, int]]:
    """Name and last step of each stage, [] in a run without stages."""
    path = run_dir / "run.json"
    stages = json.loads(path.read_text()).get("stages", []) if path.exists() else []
    return [(name, last) for name, last in stages if name]


def read_state(run_dir: Path) -> RunState:
    """The state in run.json; a run that says it is running though its process is gone was stopped."""
    path = run_dir / "run.json"
    if not path.exists():
        return RunState("new", "state unknown (no run.json)", None, None)
    try:
        run = json.loads(path.read_text())
        state, pid, host = run["state"], run["pid"], run["host"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not what a run writes ({error!r}); remove the file") from error
    total, error_text = run.get("total_steps"), run.get("error")
    if state == "finished":
        return RunState("finished", "finished", total, None)
    if state == "guarded":
        return RunState("stopped", "ended by its retention guard", total, error_text)
    if state == "failed":
        return RunState("failed", "failed", total, error_text)
    if host != socket.gethostname():
        return RunState("running", f"running (pid {pid} on {host}; not seen from this host)", total, None)
    if not process_exists(pid):
        return RunState("stopped", "stopped (killed)", total, None)
    return RunState("running", f"running (pid {pid})", total, None)


def process_exists(pid: int) -> bool:
    """Whether this host has such a process, ours or not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_sets(run_dir: Path, config: dict[str, Any]) -> list[SetProgress]:
    """The evaluation sets in the configuration's order, then any others that have results."""
    # A run resumed in the middle of an evaluation repeats it: the later line counts.
    latest = {(r.task, r.metric, r.step): r for r in read_rows(run_dir, EvalResult)}
    named = [config.get("evaluation") or {}, *(config.get("stages") or [])]
    roles = {s["name"]: s["role"] for section in named for s in section.get("sets", [])}
    sets = []
    for name in dict.fromkeys([*roles, *(task for task, _, _ in latest)]):
        students = sorted((r for (task, m, _), r in latest.items() if task == name and m in OWN), key=step_of)
        teachers = sorted((r for (task, m, _), r in latest.items() if (task, m) == (name, TEACHER)), key=step_of)
        sets.append(
            SetProgress(
                name,
                roles.get(name, ""),
                before=students[0] if students else None,
                after=students[-1] if len(students) > 1 else None,
                teacher=teachers[-1] if teachers else None,
            )
        )
    return sets


OWN = (STUDENT, PERPLEXITY)  # metrics of the model as it stands


def step_of(row: EvalResult) -> int:
    return row.step


def read_engines(run_dir: Path) -> dict[str, int]:
    """How many engines each role of a live run has, {} while they start."""
    path = run_dir / "pids.json"
    if not path.exists():
        return {}
    pids = json.loads(path.read_text())
    return {role: len(pids[role]) for role in ("student", "teacher") if role in pids}


def read_ledger(run_dir: Path) -> dict[str, int]:
    """Samples in each state, {} if there is no ledger."""
    counts = {state: lengths.total() for state, lengths in read_lengths(run_dir).items()}
    return {state: counts[state] for state in dict.fromkeys([*SAMPLE_STATES, *counts]) if state in counts}


def read_lengths(run_dir: Path) -> "dict[str, Counter[int | None]]":
    """Of each state, how many samples have how many completion tokens; None: they were not sampled yet.

    Opened read-only: the run may be writing.
    """
    path = run_dir / "ledger.sqlite"
    lengths: dict[str, Counter[int | None]] = {}
    if not path.exists():
        return lengths
    try:
        ledger = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)
        try:
            begun = ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'samples'").fetchone()
            query = "SELECT state, tokens, COUNT(*) FROM samples GROUP BY state, tokens"
            for state, tokens, count in ledger.execute(query) if begun else ():
                lengths.setdefault(state, Counter())[tokens] = count
        finally:
            ledger.close()
    except sqlite3.Error as error:
        raise UserError(f"{path}: the ledger cannot be read ({error})") from error
    return lengths


def ended_lengths(run_dir: Path) -> "dict[str, Counter[int]]":
    """The same of the samples that were trained, and of those that were dropped, as far as they have a length."""
    found = read_lengths(run_dir)
    known = {s: Counter({t: n for t, n in found[s].items() if t is not None}) for s in ENDED if s in found}
    return {state: lengths for state, lengths in known.items() if lengths}


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The whole checkpoint (one with a manifest) of the highest step."""
    saved = [folder for folder in folders(run_dir).values() if (folder / MANIFEST).exists()]
    return saved[-1] if saved else None


def status_text(run_dir: Path) -> str:
    """A screenful on a run, for a terminal. UserError if there is no run in the folder."""
    check_run_dir(run_dir)
    config, state = read_config(run_dir), read_state(run_dir)
    steps, sets, ledger = read_rows(run_dir, StepMetrics), read_sets(run_dir, config), read_ledger(run_dir)
    checkpoint = latest_checkpoint(run_dir)
    lines = [("run", str(run_dir)), ("state", state.text)]
    if state.error:
        lines.append(("error", state.error))
    of = f" of {state.total_steps}" if state.total_steps else ""
    lines.append(("step", f"{steps[-1].step if steps else 0}{of}{_age(run_dir) if state.kind == 'running' else ''}"))
    stages = read_stages(run_dir)
    if stages:
        lines.append(("stage", _stage(stages, steps[-1].step if steps else 0)))
    if state.kind == "running":
        now = time.time()
        waits = [f"{w.what} ({now - w.since:.0f} s)" for w in read_waiting(run_dir)]
        lines += [("waits for" if i == 0 else "", text) for i, text in enumerate(waits)]
        engines = read_engines(run_dir)
        if engines:
            lines.append(("engines", ", ".join(f"{count} {role}" for role, count in engines.items())))
    if steps:
        last = steps[-1]
        recent = ", ".join(f"{m.loss:.4f}" for m in steps[-5:])
        lines.append(
            ("loss", f"{recent}  ({last.divergence_name} {last.divergence:.4f}, {last.tokens_per_s:.0f} tok/s)")
        )
        bound = verdict(steps, config)
        if bound is not None:
            lines.append(("bound by", bound))
    for index, one in enumerate(sets):
        teacher = f"; teacher {percent(one.teacher.value)}" if one.teacher else ""
        at = f" at step {one.after.step}" if one.after else ""
        role = f" ({one.role})" if one.role else ""
        lines.append(("evaluation" if index == 0 else "", f"{one.name}{role}: {one.change}{at}{teacher}"))
    if ledger:
        lines.append(("samples", ", ".join(f"{count} {name}" for name, count in ledger.items())))
        lines += [("", f"{state}: {spread(lengths)}") for state, lengths in ended_lengths(run_dir).items()]
    lines.append(("checkpoint", str(checkpoint) if checkpoint else "none yet"))
    lines.append(("next", _next(run_dir, state, checkpoint)))
    return "\n".join(f"{label:<12}{text}" for label, text in lines)


def _stage(stages: list[tuple[str, int]], step: int) -> str:
    """Which stage the step after `step` is in; of a run that is at its end the last."""
    lasts = [last for _, last in stages]
    index = next((i for i, last in enumerate(lasts) if step < last), len(stages) - 1)
    first = lasts[index - 1] + 1 if index else 1
    return f"{index + 1} of {len(stages)}, {stages[index][0]}: steps {first} to {lasts[index]}"


def spread(lengths: "Counter[int]") -> str:
    """Of completion lengths: least, median and most."""
    ordered = sorted(lengths.elements())
    return f"{ordered[0]} to {ordered[-1]} tokens, median {ordered[len(ordered) // 2]}"


def _age(run_dir: Path) -> str:
    path = run_dir / "metrics.jsonl"
    return f", {max(0, time.time() - path.stat().st_mtime):.0f} s ago" if path.exists() else ""


def _next(run_dir: Path, state: RunState, checkpoint: Path | None) -> str:
    if state.kind == "running":
        return f"curves so far: sdft report {run_dir}"
    if state.kind == "finished":
        return f"curves: sdft report {run_dir}; the model as a folder: sdft export {run_dir} --out DIR"
    verb = "resume" if checkpoint else "start again"
    return f"{verb} with: sdft train {run_dir / 'config.yaml'} --run-dir {run_dir}"
