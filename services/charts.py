"""The report's curves, as SVG text to stand inside an HTML page."""

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import chain
from statistics import fmean, median
from typing import TYPE_CHECKING

from services.metrics import STUDENT, TEACHER, EvalResult, StepMetrics, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from services.continual import Matrix

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PHASE_COLOURS = {"rollout": "#0072b2", "score": "#4a9fd4", "learn": "#009e73", "sync": "#e69f00", "wait": "#999999"}
GREY, INK = "#6a737d", "#24292f"
WIDE, HALF = (9.4, 2.9), (4.6, 2.3)  # inches; the page scales them
MOST_BARS = 400  # more would not be seen, and would make the page megabytes
LENGTH_BARS, LENGTH_COLOURS = 40, (COLOURS[0], COLOURS[1])
LABEL_GAP = 0.075  # least distance of two labels, as a share of the axis


def accuracy_chart(results: Sequence[EvalResult], roles: dict[str, str], stages: Sequence[tuple[str, int]] = ()) -> str:
    """Accuracy of each set over steps with its 95 % interval; retention dashed, the teacher's accuracy dotted.

    `roles`: every set's role; the order of the sets is that of their colours. `stages`: name and last step of each.
    """
    with _chart(WIDE, "Accuracy over steps, by evaluation set") as (figure, done):
        reached = max(r.step for r in results)
        axes = _axes(figure, "accuracy, %", reached)
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
            latest = {r.step: r for r in results if r.task == task and r.metric == STUDENT}
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
            for teacher in (r for r in results if r.task == task and r.metric == TEACHER):
                axes.axhline(100 * teacher.value, linestyle=":", linewidth=1.2, color=colour)
        axes.set_ylim(-3, 103)
        _label_ends(axes, labels)
        return done()


def perplexity_chart(results: Sequence[EvalResult]) -> str:
    """Perplexity of each set of texts over steps."""
    with _chart(HALF, "Perplexity over steps") as (figure, done):
        axes = _axes(figure, "", max(r.step for r in results))
        labels = []
        for task, colour in zip(dict.fromkeys(r.task for r in results), COLOURS, strict=False):
            latest = {r.step: r.value for r in results if r.task == task}
            rows = sorted(latest.items())
            axes.plot(*zip(*rows, strict=True), color=colour, marker="o", markersize=4)
            labels.append((rows[-1][1], f"{task} {rows[-1][1]:.2f}", colour))
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.5 * (high - low), high + 0.5 * (high - low))
        _label_ends(axes, labels)
        return done()


def matrix_chart(matrix: "Matrix") -> str:
    """Heat map: accuracy of each task and retention set (columns) before training and after each stage (rows)."""
    rows, columns = len(matrix.rows), len(matrix.columns)
    with _chart((9.4, 0.75 + 0.42 * rows), "Accuracy of every task after each stage") as (figure, done):
        axes = figure.add_subplot()
        shares = [[100 * value for value in row] for row in matrix.rows]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=130, aspect="auto")
        for i, row in enumerate(shares):
            for j, value in enumerate(row):
                own = j < len(matrix.tasks) and i > 0 and matrix.stages[i - 1] == matrix.tasks[j]
                text = percent(matrix.rows[i][j])
                colour = "white" if value > 75 else INK
                axes.text(j, i, text, ha="center", va="center", color=colour, weight="bold" if own else "normal")
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
    """Loss and divergence over steps, in nats a token."""
    name = steps[-1].divergence_name
    with _chart(WIDE, f"Loss and {name} over steps") as (figure, done):
        axes = _axes(figure, "nats a token", steps[-1].step)
        _lines(axes, steps, [("loss", lambda m: m.loss, COLOURS[0]), (name, lambda m: m.divergence, COLOURS[1])])
        return done()


def time_chart(steps: Sequence[StepMetrics]) -> str:
    """Seconds of each phase, stacked (of a long run the mean of a few steps at a time); labels: the overall median."""
    together = math.ceil(len(steps) / MOST_BARS)
    groups = [steps[i : i + together] for i in range(0, len(steps), together)]
    with _chart(WIDE, "Time of each step by phase") as (figure, done):
        axes = _axes(figure, "seconds a step", steps[-1].step)
        edges = [group[0].step - 0.5 for group in groups] + [steps[-1].step + 0.5]
        below = [0.0] * len(groups)
        labels: list[tuple[float, str, str]] = []
        for phase, colour in PHASE_COLOURS.items():
            times = [[getattr(m, f"time_{phase}_s") for m in group] for group in groups]
            tops = [bottom + fmean(group) for bottom, group in zip(below, times, strict=True)]
            axes.stairs(tops, edges, baseline=below, fill=True, color=colour, linewidth=0)
            labels.append(((below[-1] + tops[-1]) / 2, f"{phase} {median(chain(*times)):.1f} s", colour))
            below = tops
        _label_ends(axes, labels)
        return done()


def length_chart(lengths: Mapping[str, "Counter[int]"]) -> str:
    """Histogram of completion lengths, a colour for each state of the samples."""
    top = max(max(counts) for counts in lengths.values())
    width = math.ceil((top + 1) / LENGTH_BARS)
    edges = list(range(0, top + width + 1, width))
    with _chart(HALF, "Lengths of rollouts") as (figure, done):
        axes = _axes(figure, "samples", top)
        axes.set_xlabel("completion tokens")
        for (state, counts), colour in zip(lengths.items(), LENGTH_COLOURS, strict=False):
            heights = [0] * (len(edges) - 1)
            for tokens, count in counts.items():
                heights[tokens // width] += count
            axes.stairs(heights, edges, fill=True, alpha=0.8, color=colour, label=state)
        if len(lengths) > 1:
            axes.legend(frameon=False)
        return done()


def gradient_chart(steps: Sequence[StepMetrics]) -> str:
    return _half(steps, "gradient norm", lambda m: m.grad_norm, COLOURS[2])


def lr_chart(steps: Sequence[StepMetrics]) -> str:
    return _half(steps, "learning rate", lambda m: m.lr, GREY)


def mismatch_chart(steps: Sequence[StepMetrics]) -> str:
    return _half(steps, "KL of sampler and learner", lambda m: m.mismatch_kl, COLOURS[3])


def tail_chart(steps: Sequence[StepMetrics]) -> str:
    return _half(steps, "teacher probability outside top-K", lambda m: m.tail_mass, COLOURS[4])


def _half(steps: Sequence[StepMetrics], title: str, value: Callable[[StepMetrics], float], colour: str) -> str:
    with _chart(HALF, f"{title} over steps") as (figure, done):
        axes = _axes(figure, "", steps[-1].step)
        axes.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
        _lines(axes, steps, [("", value, colour)])
        return done()


def _lines(
    axes: "Axes", steps: Sequence[StepMetrics], series: Sequence[tuple[str, Callable[[StepMetrics], float], str]]
) -> None:
    labels = []
    highest = 0.0
    marker = "o" if len(steps) == 1 else ""  # a line of one point would not be seen
    for name, value, colour in series:
        values = [value(m) for m in steps]
        axes.plot([m.step for m in steps], values, color=colour, marker=marker, markersize=4)
        highest = max([highest, *(v for v in values if math.isfinite(v))])
        if name and math.isfinite(values[-1]):
            labels.append((values[-1], f"{name} {values[-1]:.3f}", colour))
    axes.set_ylim(0, 1.08 * highest or 1.0)
    _label_ends(axes, labels)


def _label_ends(axes: "Axes", labels: list[tuple[float, str, str]]) -> None:
    """Name each line where it ends: (height, text, colour). Labels too close are moved apart, in their order."""
    low, high = axes.get_ylim()
    gap = LABEL_GAP * (high - low)
    placed = [height for height, _, _ in sorted(labels)]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = high
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    for height, (_, text, colour) in zip(placed, sorted(labels), strict=True):
        axes.annotate(
            text, (1.01, height), xycoords=("axes fraction", "data"), color=colour, va="center", annotation_clip=False
        )


def _axes(figure: "Figure", title: str, last_step: int) -> "Axes":
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_xlim(-0.02 * max(last_step, 1) - 0.02, 1.02 * max(last_step, 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


@contextmanager
def _chart(size: tuple[float, float], description: str) -> "Iterator[tuple[Figure, Callable[[], str]]]":
    """A figure in the report's style, and what turns it into SVG. Needs no display and leaves no global state."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",  # text stays text: small, and it can be searched
        "svg.hashsalt": description,  # the same run gives the same file; two charts of a page share no id
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "text.parse_math": False,
        "axes.labelcolor": GREY,
        "axes.edgecolor": "#c9ced6",
        "axes.titlesize": 10,
        "axes.titlecolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": "#eceff3",
        "xtick.color": GREY,
        "ytick.color": GREY,
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")

        def done() -> str:
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            return _inline(text.getvalue(), description)

        yield figure, done


def _inline(svg: str, description: str) -> str:
    """An SVG file as an element of a page: no prolog, no size, only the ids that are referred to, and a spoken name."""
    svg = svg[svg.index("<svg ") + len("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?:width|height)="[\d.]+pt" ', "", svg, count=2)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    return f'<svg role="img" aria-label="{escape(description)}" {svg.strip()}'
