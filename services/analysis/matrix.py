"""The accuracy matrix R[i][j] of a stream of tasks: every task before the first stage and after each stage.

With T tasks, R[0] before training and R[i] after stage i:

    average accuracy    mean over j of R[T][j]
    backward transfer   mean over j < T of R[T][j] - R[j][j]        (Lopez-Paz and Ranzato 2017)
    forward transfer    mean over j > 1 of R[j-1][j] - R[0][j]      (the same)
    forgetting of j     max over j <= i < T of R[i][j], less R[T][j]  (Chaudhry et al. 2018)

A task whose sets were added after the start of the run has no R[0][j]; the means leave unknown values out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sdft.services.base.errors import UserError
from sdft.services.records.rows import PERPLEXITY, STUDENT_ACCURACY, Z_95, EvalResult, read_rows
from sdft.services.records.run_dir import check_run_dir, read_stages
from sdft.services.records.settings import read_config
from sdft.services.records.text import permille

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them Z_95 of the normal distribution is used.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True)
class Matrix:
    """The accuracy matrix of one run so far; values are shares."""

    stages: tuple[str, ...]  # all stages of the stream, in order
    tasks: tuple[str, ...]  # the stages that have evaluation sets of their own: the first columns
    retention: tuple[str, ...]  # sets with role retention: the other columns
    rows: tuple[tuple[float, ...], ...]  # before training, then after each stage that is done; NaN: not evaluated

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.tasks, *self.retention)

    @property
    def row_names(self) -> tuple[str, ...]:
        return tuple(["before", *(f"after {name}" for name in self.stages)][: len(self.rows)])

    def metrics(self) -> dict[str, float]:
        """Return metrics by name, as shares, over the tasks whose stage is done; NaN or absent if undefined."""
        done = len(self.rows) - 1
        trained = [(self.stages.index(task) + 1, j) for j, task in enumerate(self.tasks)]  # (stage from 1, column)
        trained = [(i, j) for i, j in trained if i <= done]
        r, last = self.rows, done
        found = {"average accuracy": _mean([r[last][j] for _, j in trained])}
        found["backward transfer"] = _mean_known([r[last][j] - r[i][j] for i, j in trained if i < last])
        found["forward transfer"] = _mean_known([r[i - 1][j] - r[0][j] for i, j in trained if i > 1])
        for i, j in trained:
            if i < last:
                found[f"forgetting {self.tasks[j]}"] = max(r[k][j] for k in range(i, last)) - r[last][j]
        for j, name in enumerate(self.retention, len(self.tasks)):
            found[f"retention {name}"] = r[last][j]
        return found


@dataclass(frozen=True)
class Estimate:
    """A figure over runs that differ only in their seed."""

    mean: float
    half: float  # half of the 95 % interval (Student's t); NaN for one run


def read_matrix(run_dir: Path) -> Matrix:
    """Read the matrix of a run directory. UserError if the run has no stages or no evaluation yet."""
    check_run_dir(run_dir)
    config, stages = read_config(run_dir), read_stages(run_dir)
    if not config.get("stages") or not stages:
        raise UserError(f"{run_dir}: this run has no stages, and only a run with stages has a matrix")
    matrix = make_matrix(config, stages, read_rows(run_dir, EvalResult))
    if not matrix.rows or not matrix.columns:
        raise UserError(f"{run_dir}: no evaluation set with questions was evaluated yet, so there is no matrix")
    return matrix


def make_matrix(config: dict[str, Any], stages: Sequence[tuple[str, int]], results: Sequence[EvalResult]) -> Matrix:
    """Make the matrix. config: the resolved configuration. stages: (name, last step) in order."""
    of_task = {
        stage["name"]: [s["name"] for s in stage["sets"] if s["role"] == "task" and s.get("grader") != PERPLEXITY]
        for stage in config["stages"]
    }
    of_task = {name: sets for name, sets in of_task.items() if sets}
    all_sets = [*config["evaluation"]["sets"], *(s for stage in config["stages"] for s in stage["sets"])]
    retention = [s["name"] for s in all_sets if s["role"] == "retention" and s.get("grader") != PERPLEXITY]
    values = {(r.step, r.task): r.value for r in results if r.metric == STUDENT_ACCURACY}
    rows = []
    for step in [0, *(last for _, last in stages)]:
        if not any(at == step for at, _ in values):
            break
        row = [fmean(values.get((step, name), math.nan) for name in sets) for sets in of_task.values()]
        rows.append((*row, *(values.get((step, name), math.nan) for name in retention)))
    return Matrix(tuple(name for name, _ in stages), tuple(of_task), tuple(retention), tuple(rows))


def over_runs(figures: Sequence[dict[str, float]]) -> dict[str, Estimate]:
    """Return mean and 95 % interval of each figure that all runs have."""
    common = [name for name in figures[0] if all(name in run for run in figures)]
    estimates = {}
    for name in common:
        values, n = [run[name] for run in figures], len(figures)
        unknown = n < 2 or any(map(math.isnan, values))
        half = math.nan if unknown else (T_975[n - 2] if n - 2 < len(T_975) else Z_95) * stdev(values) / math.sqrt(n)
        estimates[name] = Estimate(fmean(values), half)
    return estimates


def matrix_text(matrices: Sequence[Matrix]) -> str:
    """Format the matrix and metrics for a terminal: of one run, or means of several with intervals.

    UserError if the runs differ in stages, sets or progress.
    """
    first = matrices[0]
    if any((m.stages, m.columns, len(m.rows)) != (first.stages, first.columns, len(first.rows)) for m in matrices):
        raise UserError("these runs differ in stages, evaluation sets or progress; give runs that differ only in seed")
    columns, row_names = first.columns, first.row_names
    cells = [{str(j): m.rows[i][j] for j in range(len(columns))} for i in range(len(row_names)) for m in matrices]
    width = max([14, *(len(name) + 2 for name in columns)])
    names = max(len(name) for name in row_names) + 2
    lines = ["".join([" " * names, *(f"{name:>{width}}" for name in columns)])]
    for i, name in enumerate(row_names):
        row = over_runs(cells[i * len(matrices) : (i + 1) * len(matrices)])
        lines.append("".join([f"{name:<{names}}", *(f"{_share(row[str(j)]):>{width}}" for j in range(len(row)))]))
    metrics = over_runs([m.metrics() for m in matrices])
    known = {name: e for name, e in metrics.items() if not math.isnan(e.mean)}
    lines += ["", *(f"{name:<24}{figure_text(name, e)}" for name, e in known.items())]
    if len(matrices) > 1:
        lines.append(f"\n{len(matrices)} runs; ± is half of the 95 % interval over them (Student's t)")
    return "\n".join(lines)


def figure_text(name: str, e: Estimate) -> str:
    """Format a metric in percent, with a sign if it is a transfer."""
    return _share(e, sign="transfer" in name)


def _share(e: Estimate, sign: bool = False) -> str:
    if math.isnan(e.mean):
        return "–"
    text = f"{permille(e.mean) / 10:{'+' if sign else ''}.1f}".replace("-", "−")
    return f"{text} %" if math.isnan(e.half) else f"{text} ± {100 * e.half:.1f} %"


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _mean_known(values: Sequence[float]) -> float:
    return _mean([value for value in values if not math.isnan(value)])
