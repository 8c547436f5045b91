"""The report's curves, each as SVG text."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean, median
from typing import TYPE_CHECKING

from sdft.services.analysis.svg import HALF, INK, WIDE, axes_of, chart, label_ends, lines
from sdft.services.records.figures import COLOURS, GREY, PHASES, Curve
from sdft.services.records.rows import STUDENT_ACCURACY, TEACHER_ACCURACY, EvalResult, StepMetrics, divergence_names
from sdft.services.records.text import percent

if TYPE_CHECKING:
    from sdft.services.analysis.matrix import Matrix

MOST_BARS = 400  # more bars are invisible and add megabytes to the page
LENGTH_BARS, LENGTH_COLOURS = 40, (COLOURS[0], COLOURS[1])


def accuracy_chart(results: Sequence[EvalResult], roles: dict[str, str], stages: Sequence[tuple[str, int]] = ()) -> str:
    """Accuracy of each set over steps with its 95 % interval; retention dashed, the teacher's accuracy dotted.

    `roles`: role of each set; colours follow their order. `stages`: (name, last step) of each stage.
    """
    with chart(WIDE, "Accuracy over steps, by evaluation set") as (figure, done):
        reached = max(r.step for r in results)
        axes = axes_of(figure, "accuracy, %", reached)
        if stages:
            axes.set_title("accuracy, %", loc="left", pad=18)  # above the stages' names
        first = 0
        for name, last in stages:
            if first < reached:
                axes.axvline(first, color=GREY, linewidth=0.8, alpha=0.6)
                axes.text(first, 104, f" {name}", color=GREY, fontsize=8, va="bottom")
            first = last
        labels: list[tuple[float, str, str]] = []
        for index, task in enumerate(roles):
            colour = COLOURS[index % len(COLOURS)]
            latest = {r.step: r for r in results if r.task == task and r.metric == STUDENT_ACCURACY}
            rows = [latest[step] for step in sorted(latest)]
            if rows:
                steps, values = [r.step for r in rows], [100 * r.value for r in rows]
                lows, highs = zip(*(r.interval for r in rows), strict=True)
                axes.fill_between(
                    steps, [100 * v for v in lows], [100 * v for v in highs], color=colour, alpha=0.13, linewidth=0
                )
                axes.vlines(steps, [100 * v for v in lows], [100 * v for v in highs], color=colour, alpha=0.35)
                style = "--" if roles[task] == "retention" else "-"
                axes.plot(steps, values, style, color=colour, marker="o", markersize=4)
                labels.append((values[-1], f"{task} {percent(rows[-1].value)}", colour))
            for teacher in (r for r in results if r.task == task and r.metric == TEACHER_ACCURACY):
                axes.axhline(100 * teacher.value, linestyle=":", linewidth=1.2, color=colour)
        axes.set_ylim(-3, 103)
        label_ends(axes, labels)
        return done()


def perplexity_chart(results: Sequence[EvalResult]) -> str:
    """Perplexity of each set of texts over steps."""
    with chart(HALF, "Perplexity over steps") as (figure, done):
        axes = axes_of(figure, "", max(r.step for r in results))
        labels = []
        for task, colour in zip(dict.fromkeys(r.task for r in results), COLOURS, strict=False):
            latest = {r.step: r.value for r in results if r.task == task}
            rows = sorted(latest.items())
            axes.plot(*zip(*rows, strict=True), color=colour, marker="o", markersize=4)
            labels.append((rows[-1][1], f"{task} {rows[-1][1]:.2f}", colour))
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.5 * (high - low), high + 0.5 * (high - low))
        label_ends(axes, labels)
        return done()


def pass_at_chart(task: str, results: Sequence[EvalResult]) -> str:
    """pass@k of one set against k at the first and the last evaluation; the teacher's is dotted."""
    teachers, students = ([r for r in results if r.task == task and r.by_teacher == which] for which in (True, False))
    first, last = min(r.step for r in students), max(r.step for r in students)
    lines_of = [(f"step {last}", COLOURS[0], "-", [r for r in students if r.step == last])]
    if first < last:
        lines_of.append((f"step {first}", GREY, "-", [r for r in students if r.step == first]))
    if teachers:
        lines_of.append(("teacher", COLOURS[0], ":", teachers))
    with chart(HALF, f"pass@k of {task}") as (figure, done):
        axes = figure.add_subplot()
        axes.set_title(f"{task}, %", loc="left")
        axes.set_xlabel("replies per question")
        labels = []
        for name, colour, style, rows in lines_of:
            shares = {r.k: 100 * r.value for r in rows if r.k}  # a resumed run may repeat a row: the later counts
            axes.plot(list(shares), list(shares.values()), style, color=colour, marker="o", markersize=4)
            labels.append((list(shares.values())[-1], name, colour))
        axes.set_xscale("log", base=2)
        ks = sorted({r.k for r in students if r.k})
        axes.set_xticks(ks, list(map(str, ks)))
        axes.minorticks_off()
        axes.set_ylim(-3, 103)
        label_ends(axes, labels)
        return done()


def matrix_chart(matrix: "Matrix") -> str:
    """Heat map: accuracy of each task and retention set (columns) before training and after each stage (rows)."""
    rows, columns = len(matrix.rows), len(matrix.columns)
    with chart((9.4, 0.75 + 0.42 * rows), "Accuracy of every task after each stage") as (figure, done):
        axes = figure.add_subplot()
        shares = [[100 * value for value in row] for row in matrix.rows]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=130, aspect="auto")
        for i, row in enumerate(shares):
            for j, value in enumerate(row):
                just_trained = j < len(matrix.tasks) and i > 0 and matrix.stages[i - 1] == matrix.tasks[j]
                text = percent(matrix.rows[i][j])
                colour, weight = "white" if value > 75 else INK, "bold" if just_trained else "normal"
                axes.text(j, i, text, ha="center", va="center", color=colour, weight=weight)
        axes.set_xticks(range(columns), [*matrix.tasks, *(f"{name} (retention)" for name in matrix.retention)])
        axes.set_yticks(range(rows), matrix.row_names)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        if matrix.retention and matrix.tasks:
            axes.axvline(len(matrix.tasks) - 0.5, color="white", linewidth=4)
        return done()


def loss_chart(steps: Sequence[StepMetrics]) -> str:
    """Loss and divergence over steps, in nats per token."""
    name = steps[-1].divergence_name
    with chart(WIDE, f"Loss and {divergence_names(steps)} over steps") as (figure, done):
        axes = axes_of(figure, "nats per token", steps[-1].step)
        lines(axes, steps, [("loss", lambda m: m.loss, COLOURS[0]), (name, lambda m: m.divergence, COLOURS[1])])
        return done()


def time_chart(steps: Sequence[StepMetrics]) -> str:
    """Seconds of each phase, stacked; long runs show means of several steps. Labels: the median over all steps."""
    together = math.ceil(len(steps) / MOST_BARS)
    groups = [steps[i : i + together] for i in range(0, len(steps), together)]
    with chart(WIDE, "Time of each step by phase") as (figure, done):
        axes = axes_of(figure, "seconds per step", steps[-1].step)
        edges = [group[0].step - 0.5 for group in groups] + [steps[-1].step + 0.5]
        below = [0.0] * len(groups)
        labels: list[tuple[float, str, str]] = []
        for phase in PHASES:
            times = [[m.seconds(phase) for m in group] for group in groups]
            tops = [bottom + fmean(group) for bottom, group in zip(below, times, strict=True)]
            axes.stairs(tops, edges, baseline=below, fill=True, color=phase.colour, linewidth=0)
            labels.append(((below[-1] + tops[-1]) / 2, f"{phase.name} {median(chain(*times)):.1f} s", phase.colour))
            below = tops
        label_ends(axes, labels)
        return done()


def length_chart(lengths: Mapping[str, "Counter[int]"]) -> str:
    """Histogram of completion lengths, one colour per sample state."""
    top = max(max(counts) for counts in lengths.values())
    width = math.ceil((top + 1) / LENGTH_BARS)
    edges = list(range(0, top + width + 1, width))
    with chart(HALF, "Lengths of rollouts") as (figure, done):
        axes = axes_of(figure, "samples", top)
        axes.set_xlabel("completion tokens")
        for (state, counts), colour in zip(lengths.items(), LENGTH_COLOURS, strict=False):
            heights = [0] * (len(edges) - 1)
            for tokens, count in counts.items():
                heights[tokens // width] += count
            axes.stairs(heights, edges, fill=True, alpha=0.8, color=colour, label=state)
        if len(lengths) > 1:
            axes.legend(frameon=False)
        return done()


def figure_chart(steps: Sequence[StepMetrics], field: str, curve: Curve) -> str:
    """One figure over steps. `field`: its field of StepMetrics."""
    with chart(HALF, f"{curve.quantity} over steps") as (figure, done):
        axes = axes_of(figure, "", steps[-1].step)
        axes.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
        lines(axes, steps, [("", lambda m: math.nan if (v := getattr(m, field)) is None else v, curve.colour)])
        return done()
