"""Figures in the report's style, as SVG text for embedding in an HTML page."""

import io
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

from sdft.services.records.figures import GREY
from sdft.services.records.rows import StepMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#24292f"
WIDE, HALF = (9.4, 2.9), (4.6, 2.3)  # inches; the page scales them
LABEL_GAP = 0.075  # smallest distance of two labels, as a share of the axis


def lines(
    axes: "Axes", steps: Sequence[StepMetrics], series: Sequence[tuple[str, Callable[[StepMetrics], float], str]]
) -> None:
    labels = []
    lowest = highest = 0.0
    marker = "o" if len(steps) == 1 else ""  # a line of one point is invisible
    for name, value, colour in series:
        values = [value(m) for m in steps]
        axes.plot([m.step for m in steps], values, color=colour, marker=marker, markersize=4)
        finite = [v for v in values if math.isfinite(v)]
        lowest, highest = min([lowest, *finite]), max([highest, *finite])
        if name and math.isfinite(values[-1]):
            labels.append((values[-1], f"{name} {values[-1]:.3f}", colour))
    axes.set_ylim(1.08 * lowest, 1.08 * highest if highest > lowest else 1.0)
    label_ends(axes, labels)


def label_ends(axes: "Axes", labels: list[tuple[float, str, str]]) -> None:
    """Label each line at its end: (height, text, colour). Labels that are too close are moved apart, in order."""
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


def axes_of(figure: "Figure", title: str, last_step: int) -> "Axes":
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_xlim(-0.02 * max(last_step, 1) - 0.02, 1.02 * max(last_step, 1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


@contextmanager
def chart(size: tuple[float, float], description: str) -> "Iterator[tuple[Figure, Callable[[], str]]]":
    """Yield a figure in the report's style and a function that renders it as SVG. No display, no global state."""
    # Without a home folder that can be written, matplotlib uses a temporary one, removes it at exit, and warns.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",  # keep text as text: smaller and searchable
        "svg.hashsalt": description,  # reproducible files; no id is shared by two charts of a page
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
    """Turn an SVG file into an HTML element: no prolog, no size, no unreferenced ids, and an aria-label."""
    svg = svg[svg.index("<svg ") + len("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?:width|height)="[\d.]+pt" ', "", svg, count=2)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    return f'<svg role="img" aria-label="{escape(description)}" {svg.strip()}'
