"""The figures of a step and the phases of its time: what each is called and means, and how it is drawn.

StepMetrics (rows.py) describes its fields with figure(...)
    -> sinks and Prometheus: names and help        -> charts: title, note, colour
PHASES -> console, time chart, bottleneck sentence, Prometheus' tag
"""

from dataclasses import dataclass

# Okabe and Ito's colour-blind safe palette.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#6a737d"


@dataclass(frozen=True)
class Phase:
    """A phase of a step; the field time_<name>_s of StepMetrics has its seconds."""

    name: str
    activity: str  # subject of "ACTIVITY, 40 % of a step"
    colour: str  # in charts
    terminal: str  # rich's name of its colour


PHASES = (
    Phase("rollout", "sampling", COLOURS[0], "blue"),
    Phase("score", "the teacher's scoring", "#4a9fd4", "magenta"),
    Phase("learn", "the learner's step", COLOURS[2], "green"),
    Phase("sync", "weight updates", COLOURS[4], "yellow"),
    Phase("wait", "waiting for checkpoints", "#999999", "bright_black"),
)


@dataclass(frozen=True)
class Curve:
    """A small chart of the report."""

    title: str
    quantity: str  # what the curve shows, for readers that see no picture
    note: str
    colour: str


@dataclass(frozen=True)
class Figure:
    """A number of a step."""

    help: str
    prometheus: str  # name in Prometheus, behind sdft_
    counter: bool = False  # Prometheus adds the values of all steps up
    curve: Curve | None = None


def figure(help: str, prometheus: str, counter: bool = False, curve: Curve | None = None) -> dict[str, Figure]:
    """Return the metadata of a dataclass field that has this figure."""
    return {"figure": Figure(help, prometheus, counter, curve)}


def path_of(field: str) -> str:
    """Return the name that sinks have for a field of StepMetrics: train/loss, time/learn_s."""
    return f"time/{field.removeprefix('time_')}" if field.startswith("time_") else f"train/{field}"
