"""Detectors: figures of a step that have moved too far from the start of the stage.

    steps of a stage │ first `window` steps │ ................. │ last `window` steps │
                     └─ mean: before                            └─ mean: now            ─► drifts: moved too far

Nothing is compared before a stage has 2 * window steps. The state is a function of the rows of metrics.jsonl.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

from sdft.services.config.detectors import DetectorsConfig
from sdft.services.records.factors import NATS, TOKEN, moved_by, times
from sdft.services.records.rows import StepMetrics
from sdft.services.records.text import percent


@dataclass(frozen=True)
class Detector:
    """What is compared, and how."""

    name: str  # the key of its threshold
    figure: str  # a field of StepMetrics
    what: str
    moved: Callable[[float, float], float]  # how far a figure is, now, from where it was before
    is_share: bool = True
    least: float = 0.0  # of a figure that is no share: less counts as this, so that a factor is finite


def times_more(before: float, now: float) -> float:
    return now / before


def more(before: float, now: float) -> float:
    return now - before


def less(before: float, now: float) -> float:
    return before - now


def other(before: float, now: float) -> float:
    return abs(now - before)


DETECTORS = (
    Detector("length", "length_mean", "the mean length of completions", times, False, TOKEN),
    Detector("length_tail", "length_tail", "the 95th percentile of lengths", times_more, False, TOKEN),
    Detector("truncated", "truncated", "the share of truncated completions", more),
    Detector("empty", "empty", "the share of empty completions", more),
    Detector("repeated", "repeated", "the share of repeated 3-grams", more),
    Detector("distinct", "distinct", "the share of distinct 3-grams", less),
    Detector("entropy", "entropy", "the entropy", times, False, NATS),
    Detector("divergence", "divergence", "the divergence", times_more, False, NATS),
    Detector("leaks", "leaks", "the share of completions with words of the teacher's template", more),
    Detector("thoughts", "thoughts", "the share of completions with a mark of reasoning", other),
)


@dataclass(frozen=True)
class Drift:
    """A figure that is further from its value at the start of the stage than is allowed."""

    detector: Detector
    step: int
    before: float
    now: float
    allowed: float

    def __str__(self) -> str:
        d, at = self.detector, f" at step {self.step}"
        if not d.is_share:
            return moved_by(d.what, self.before, self.now, self.allowed, at)
        verb, allowed = "rose" if self.now > self.before else "fell", f"{100 * self.allowed:g} points are allowed"
        return f"{d.what} {verb} from {percent(self.before)} to {percent(self.now)}{at}: {allowed}"


class Detectors:
    """Judges the steps of a run in order. config: None switches all off. earlier: the steps from before a resume."""

    def __init__(self, config: DetectorsConfig | None, earlier: Iterable[StepMetrics]) -> None:
        self._config = config
        self._stage = -1
        self._first: list[StepMetrics] = []  # of the stage, at most `window`
        self._last: deque[StepMetrics] = deque(maxlen=config.window if config else 0)  # behind the first
        self._out: frozenset[str] = frozenset()  # detectors that have drifted by the last step
        self.last: dict[str, Drift] = {}  # the last drift of each detector
        self.held: int | None = None  # last step by which nothing had drifted
        for row in earlier:
            self.judge(row)

    def judge(self, row: StepMetrics) -> list[Drift]:
        """Return what has drifted by this step and had not by the step before."""
        if self._config is None:
            return []
        if row.stage != self._stage:
            self._stage, self._first = row.stage, []
            self._last.clear()
        (self._first if len(self._first) < self._config.window else self._last).append(row)
        drifts = [drift for detector in DETECTORS if (drift := self._drift(detector, row.step)) is not None]
        new = [drift for drift in drifts if drift.detector.name not in self._out]
        self.last |= {drift.detector.name: drift for drift in drifts}
        self._out = frozenset(drift.detector.name for drift in drifts)
        if not drifts:
            self.held = row.step
        return new

    def _drift(self, detector: Detector, step: int) -> Drift | None:
        if len(self._last) < (self._last.maxlen or 0):
            return None
        allowed = getattr(self._config, detector.name)
        before, now = _mean(self._first, detector.figure), _mean(self._last, detector.figure)
        if allowed is None or before is None or now is None:
            return None
        moved = detector.moved(max(before, detector.least), max(now, detector.least))
        if moved <= allowed + 1e-9:  # shares are quotients: 0.3 may be 0.30000000000000004
            return None
        return Drift(detector, step, before, now, allowed)


def _mean(rows: Iterable[StepMetrics], figure: str) -> float | None:
    """Return the mean of a figure; None unless some step has it. Steps without it, or with NaN, do not count."""
    values = [value for row in rows if (value := getattr(row, figure)) is not None and math.isfinite(value)]
    return fmean(values) if values else None
