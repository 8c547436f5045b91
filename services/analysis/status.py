"""Read the state, evaluation, samples and checkpoints of a run directory; the text of `sdft status`."""

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.actors.config import LEARNER
from sdft.services.analysis.bottleneck import verdict
from sdft.services.analysis.events import event_lines
from sdft.services.records.checkpoints import MANIFEST, folders
from sdft.services.records.rows import (
    PERPLEXITY,
    STUDENT_ACCURACY,
    TEACHER_ACCURACY,
    EvalResult,
    Event,
    StepMetrics,
    read_rows,
    without_loss_tokens,
)
from sdft.services.records.run_dir import (
    NO_END,
    RunState,
    check_run_dir,
    read_ledger,
    read_lengths,
    read_stages,
    read_state,
)
from sdft.services.records.settings import read_config
from sdft.services.records.skipped import SKIPPED, read_skipped
from sdft.services.records.text import percent
from sdft.services.records.waits import read_waiting

ENDED = ("trained", "dropped")


@dataclass(frozen=True)
class SetProgress:
    """Results of one evaluation set: the first, the latest (None until there is a second) and the teacher's."""

    name: str
    role: str  # task, retention, or "" if the configuration does not name the set
    before: EvalResult | None
    after: EvalResult | None
    teacher: EvalResult | None

    @property
    def change(self) -> str:
        """The change from before to after, as text."""
        if self.before is None:
            return "not evaluated yet"
        if self.after is None:
            return f"{self.before.text} (n {self.before.n})"
        return f"{self.before.text} → {self.after.text.removeprefix('perplexity ')} (n {self.after.n})"


def read_sets(run_dir: Path, config: dict[str, Any]) -> list[SetProgress]:
    """Return the evaluation sets in the configuration's order, then any others that have results."""
    # A run resumed in the middle of an evaluation repeats it; the later line counts.
    latest = {(r.task, r.metric, r.step): r for r in read_rows(run_dir, EvalResult)}
    named = [config.get("evaluation") or {}, *(config.get("stages") or [])]
    roles = {s["name"]: s["role"] for section in named for s in section.get("sets", [])}
    sets = []
    for name in dict.fromkeys([*roles, *(task for task, _, _ in latest)]):
        students = sorted(
            (r for (task, m, _), r in latest.items() if task == name and m in STUDENT_METRICS), key=step_of
        )
        teachers = sorted(
            (r for (task, m, _), r in latest.items() if (task, m) == (name, TEACHER_ACCURACY)), key=step_of
        )
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


STUDENT_METRICS = (STUDENT_ACCURACY, PERPLEXITY)


def step_of(row: EvalResult) -> int:
    return row.step


def read_engines(run_dir: Path) -> dict[str, int]:
    """Return the number of engines of each pool of a running run; {} while they start."""
    path = run_dir / "pids.json"
    if not path.exists():
        return {}
    pids = json.loads(path.read_text())
    return {pool: len(pids[pool]) for pool in pids if pool != LEARNER}


def ended_lengths(run_dir: Path) -> "dict[str, Counter[int]]":
    """Return {state: {tokens: samples}} of trained and dropped samples; samples without a length are left out."""
    found = read_lengths(run_dir)
    known = {s: Counter({t: n for t, n in found[s].items() if t is not None}) for s in ENDED if s in found}
    return {state: lengths for state, lengths in known.items() if lengths}


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the whole checkpoint (one with a manifest) of the highest step; None if there is none."""
    saved = [folder for folder in folders(run_dir).values() if (folder / MANIFEST).exists()]
    return saved[-1] if saved else None


def status_text(run_dir: Path) -> str:
    """Format the status of a run for a terminal. UserError if there is no run in the folder."""
    check_run_dir(run_dir)
    config, state = read_config(run_dir), read_state(run_dir)
    steps, sets, ledger = read_rows(run_dir, StepMetrics), read_sets(run_dir, config), read_ledger(run_dir)
    checkpoint = latest_checkpoint(run_dir)
    lines = [("run", str(run_dir)), ("state", state.text)]
    if state.error:
        lines.append(("error", state.error))
    of = f" of {state.total_steps}" if state.total_steps else ""
    lines.append(("step", f"{steps[-1].step if steps else 0}{of}{_age(run_dir) if state.status == 'running' else ''}"))
    stages = read_stages(run_dir)
    if stages:
        lines.append(("stage", _stage(stages, steps[-1].step if steps else 0)))
    if state.status == "running":
        now = time.time()
        waits = [f"{w.what} ({now - w.since:.0f} s)" for w in read_waiting(run_dir)]
        lines += [("waits for" if i == 0 else "", text) for i, text in enumerate(waits)]
        engines = read_engines(run_dir)
        if engines:
            lines.append(("engines", ", ".join(f"{count} {pool}" for pool, count in engines.items())))
    if steps:
        last = steps[-1]
        recent = ", ".join(f"{m.loss:.4f}" for m in steps[-5:])
        lines.append(
            ("loss", f"{recent}  ({last.divergence_name} {last.divergence:.4f}, {last.tokens_per_s:.0f} tok/s)")
        )
        empty = without_loss_tokens(steps)
        if empty is not None:
            lines.append(("warning", empty))
        bound = verdict(steps, config)
        if bound is not None:
            lines.append(("bound by", bound))
    for index, s in enumerate(sets):
        teacher = f"; teacher {percent(s.teacher.value)}" if s.teacher else ""
        at = f" at step {s.after.step}" if s.after else ""
        role = f" ({s.role})" if s.role else ""
        lines.append(("evaluation" if index == 0 else "", f"{s.name}{role}: {s.change}{at}{teacher}"))
    lines += event_lines(read_rows(run_dir, Event))
    if ledger:
        lines.append(("samples", ", ".join(f"{count} {name}" for name, count in ledger.items())))
        lines += [("", f"{state}: {spread(lengths)}") for state, lengths in ended_lengths(run_dir).items()]
    skipped = read_skipped(run_dir)
    if skipped:
        lines.append(("skipped", f"{len(skipped)} rows, in {run_dir / SKIPPED}; the last one is {skipped[-1]}"))
    lines.append(("checkpoint", str(checkpoint) if checkpoint else "none yet"))
    lines.append(("next", _next(run_dir, state, checkpoint)))
    return "\n".join(f"{label:<12}{text}" for label, text in lines)


def _stage(stages: list[tuple[str, int]], step: int) -> str:
    """Describe the stage of the step after `step`; the last stage at the end of a run."""
    lasts = [last for _, last in stages]
    index = next((i for i, last in enumerate(lasts) if step < last), len(stages) - 1)
    first = lasts[index - 1] + 1 if index else 1
    last = "the end of its source" if lasts[index] == NO_END else lasts[index]
    return f"{index + 1} of {len(stages)}, {stages[index][0]}: steps {first} to {last}"


def spread(lengths: "Counter[int]") -> str:
    """Format minimum, maximum and median of completion lengths."""
    ordered = sorted(lengths.elements())
    return f"{ordered[0]} to {ordered[-1]} tokens, median {ordered[len(ordered) // 2]}"


def _age(run_dir: Path) -> str:
    path = run_dir / "metrics.jsonl"
    return f", {max(0, time.time() - path.stat().st_mtime):.0f} s ago" if path.exists() else ""


def _next(run_dir: Path, state: RunState, checkpoint: Path | None) -> str:
    if state.status == "running":
        return f"curves so far: sdft report {run_dir}"
    if state.status == "finished":
        return f"curves: sdft report {run_dir}; the model as a folder: sdft export {run_dir} --out DIR"
    verb = "resume" if checkpoint else "start again"
    return f"{verb} with: sdft train {run_dir / 'config.yaml'} --run-dir {run_dir}"
