"""Metrics for Prometheus through Ray: the agent of the driver's node serves each metric as ray_<name>.

    StepMetrics, EvalResult -> ray.util.metrics -> agent of the node -> http://NODE:METRICS_PORT/metrics

The metrics show the state of a live run. They are no record: the agent drops the gauges of a driver 20 s after its end,
and Ray serves no value that is not finite. The record is metrics.jsonl.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.services.records.figures import path_of
from sdft.services.records.rows import step_figures

PREFIX = "ray_"  # Ray prepends it to every name
RUN = "run"  # tag of every metric: the run directory's name
NOT_FINITE_IF = ("train/loss", "train/divergence", "train/grad_norm")


@dataclass(frozen=True)
class Metric:
    """One Prometheus metric, named without Ray's prefix. counter: the values of all steps are added up."""

    name: str
    help: str
    tags: tuple[str, ...] = (RUN,)
    counter: bool = False


STEP = Metric("sdft_step", "Last optimizer step of the run")
PROGRESS = Metric(
    "sdft_progress_timestamp_seconds", "Unix time of the last step or evaluation result; before the first, of the start"
)
NOT_FINITE = Metric("sdft_not_finite", "1 if the last step's loss, divergence or gradient norm is not finite, else 0")
TIME = Metric(
    "sdft_time_seconds", "Time of the last step by phase; with max_staleness above 0 phases overlap", (RUN, "phase")
)
EVAL = Metric(
    "sdft_eval_value",
    "Last accuracy of an evaluation set, 0 to 1; perplexity for a set of texts",
    (RUN, "task", "metric"),
)

# Keys are the metric names of Sink.log. Counters add up the work of this process: repeated steps count again.
BY_PATH: Mapping[str, Metric] = {
    path_of(field): Metric(f"sdft_{figure.prometheus}", figure.help, counter=figure.counter)
    for field, figure in step_figures().items()
}
METRICS = (STEP, PROGRESS, NOT_FINITE, TIME, EVAL, *BY_PATH.values())


class Prometheus:
    """Sink that sets Ray metrics. RuntimeError if the process is not connected to Ray."""

    def __init__(self, run_dir: Path) -> None:
        import ray
        from ray.util.metrics import Counter, Gauge

        if not ray.is_initialized():
            raise RuntimeError("monitoring.prometheus needs a process that is connected to Ray")
        self._run = {RUN: run_dir.resolve().name}
        self._instruments: dict[str, Any] = {
            m.name: (Counter if m.counter else Gauge)(m.name, m.help, m.tags) for m in METRICS
        }

    def go_on(self, first_step: int) -> None:
        self._set(STEP, max(0, first_step - 1))
        self._set(PROGRESS, time.time())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for path, value in metrics.items():
            group, _, name = path.partition("/")
            if group == "eval":
                task, _, metric = name.partition("/")
                self._set(EVAL, value, task=task, metric=metric)
            elif path in BY_PATH:
                self._set(BY_PATH[path], value)
            else:
                self._set(TIME, value, phase=name.removesuffix("_s"))
        if all(path in metrics for path in NOT_FINITE_IF):
            self._set(STEP, step)
            self._set(NOT_FINITE, float(not all(math.isfinite(metrics[path]) for path in NOT_FINITE_IF)))
        self._set(PROGRESS, time.time())

    def close(self) -> None:
        """Nothing to do: Ray sends the last values when the process disconnects from it."""

    def _set(self, metric: Metric, value: float, /, **tags: str) -> None:
        instrument = self._instruments[metric.name]
        if not metric.counter:
            instrument.set(value, self._run | tags)
        elif value > 0:  # Ray rejects an increment of 0
            instrument.inc(value, self._run | tags)
