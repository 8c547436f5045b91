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

PREFIX = "ray_"  # Ray prepends it to every name
RUN = "run"  # tag of every metric: the run directory's name
PHASES = ("rollout", "score", "learn", "sync", "wait")
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
    "train/stage": Metric("sdft_stage", "Stage that the last step belongs to"),
    "train/loss": Metric("sdft_loss", "Loss of the last step"),
    "train/divergence": Metric("sdft_divergence", "Divergence of the last step, nats per token"),
    "train/grad_norm": Metric("sdft_grad_norm", "Norm of the last step's gradient, before it is clipped"),
    "train/lr": Metric("sdft_learning_rate", "Learning rate of the last step"),
    "train/samples": Metric("sdft_samples_total", "Samples of all steps", counter=True),
    "train/prompt_tokens": Metric("sdft_prompt_tokens_total", "Prompt tokens of all steps", counter=True),
    "train/completion_tokens": Metric("sdft_completion_tokens_total", "Completion tokens of all steps", counter=True),
    "train/loss_tokens": Metric("sdft_loss_tokens_total", "Loss tokens of all steps", counter=True),
    "train/student_version": Metric("sdft_student_version", "Newest weight version that sampled for the last step"),
    "train/teacher_version": Metric(
        "sdft_teacher_version", "Oldest weight version of the teacher that scored for the last step"
    ),
    "train/staleness_mean": Metric("sdft_staleness_mean", "Mean staleness of the last step's rollouts, in steps"),
    "train/staleness_max": Metric("sdft_staleness_max", "Largest staleness of the last step's rollouts, in steps"),
    "train/mismatch_kl": Metric("sdft_mismatch_kl", "Estimated KL between sampler and learner, nats per token"),
    "train/tail_mass": Metric("sdft_tail_mass", "Mean probability mass of the teacher outside its top K"),
    "train/tokens_per_s": Metric("sdft_tokens_per_second", "Completion tokens per second of the last step"),
    "train/trained": Metric("sdft_samples_trained", "Samples trained; falls when the run resumes from an earlier step"),
    "train/dropped": Metric("sdft_samples_dropped", "Samples dropped; falls when the run resumes from an earlier step"),
    "train/in_flight": Metric("sdft_samples_in_flight", "Samples in flight: issued, and neither trained nor dropped"),
    "time/step_s": Metric("sdft_step_seconds", "Time of the last step"),
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
