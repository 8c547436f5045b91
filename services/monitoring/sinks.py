"""Sinks for metrics besides the run's own files: TensorBoard, Weights & Biases, MLflow, Prometheus (prometheus.py).

metrics.jsonl is the record of a run; sinks only display it. A sink that fails is reported once and switched off, and
the run continues.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sdft.services.config.sections import MonitoringConfig
from sdft.services.monitoring.prometheus import Prometheus
from sdft.services.records.settings import read_config


class Sink(Protocol):
    """A display of metrics. Metric names are paths: train/loss, time/rollout_s, eval/<set>/<metric>."""

    def go_on(self, first_step: int) -> None:
        """Continue with this step (0: the run begins). It may have been logged before."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files to run_dir/tensorboard. Curves are cut off at the step the run continues with."""

    def __init__(self, run_dir: Path) -> None:
        # Not torch.utils.tensorboard, which wraps the same writer: importing torch takes two seconds.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))

    def go_on(self, first_step: int) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=first_step, session_log=self._start))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to one W&B run per process. A resumed run is another one in the same group, so their curves overlay.

    W&B accepts steps in order. Steps before the last one logged, repeated after the loss of a learner, are left out.
    """

    def __init__(self, run_dir: Path, project: str) -> None:
        import wandb

        config = read_config(run_dir)
        self._run = wandb.init(project=project, dir=str(run_dir), config=config, group=run_dir.resolve().name)
        self._last = -1

    def go_on(self, first_step: int) -> None:
        """Nothing to do."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self._last:  # equal: a step's metrics and its evaluations are separate calls
            self._run.log(metrics, step=step)
            self._last = step

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Logs to one MLflow run per process, named after the run directory, on the server at MLFLOW_TRACKING_URI."""

    def __init__(self, run_dir: Path, experiment: str) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(experiment)
        mlflow.start_run(run_name=run_dir.resolve().name)
        if (run_dir / "config.yaml").exists():
            mlflow.log_artifact(str(run_dir / "config.yaml"))

    def go_on(self, first_step: int) -> None:
        """Nothing to do: MLflow keeps both values of a repeated step."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # MLflow rejects names with @, such as pass@8.
        named = {name.replace("@", "_at_"): value for name, value in metrics.items()}
        # Asynchronous: a training step neither waits for the server nor fails when it cannot be reached.
        self._mlflow.log_metrics(named, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


class Sinks:
    """The configured sinks, open for the lifetime of a process's work."""

    def __init__(self, run_dir: Path, monitoring: MonitoringConfig, notice: Callable[[str], None]) -> None:
        """notice(text): called when a sink fails."""
        self._notice = notice
        self._sinks: dict[str, Sink] = {}
        opening: dict[str, Callable[[], Sink]] = {}
        if monitoring.tensorboard:
            opening["TensorBoard"] = lambda: TensorBoard(run_dir)
        if (project := monitoring.wandb_project) is not None:
            opening["W&B"] = lambda: WeightsAndBiases(run_dir, project)
        if (experiment := monitoring.mlflow_experiment) is not None:
            opening["MLflow"] = lambda: MLflow(run_dir, experiment)
        if monitoring.prometheus:
            opening["Prometheus"] = lambda: Prometheus(run_dir)
        for name, open_sink in opening.items():
            try:
                self._sinks[name] = open_sink()
            except Exception as error:  # noqa: BLE001 - as in _each
                self._failed(name, error)

    def go_on(self, first_step: int) -> None:
        """Continue with this step in every sink, as in `Sink.go_on`."""
        self._each(lambda sink: sink.go_on(first_step))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._each(lambda sink: sink.log(step, metrics))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(self, work: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                work(sink)
            except Exception as error:  # noqa: BLE001 - a library with a server behind it may raise anything
                del self._sinks[name]
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        why = f"{type(error).__name__}: {error}".strip(": \n").splitlines()[0]
        self._notice(f"{name} failed ({why}) and is switched off until the run restarts; metrics.jsonl has all metrics")
