"""Where metrics go beside the run's own files: TensorBoard, Weights & Biases, MLflow, Prometheus (prometheus.py).

metrics.jsonl is the record of a run. These only show it: one that fails is reported once and switched off, and the run
goes on.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sdft.services.config.sections import MonitoringConfig
from sdft.services.monitoring.prometheus import Prometheus
from sdft.services.records.settings import read_config


class Sink(Protocol):
    """One place that shows curves. Metric names are paths: train/loss, time/rollout_s, eval/<set>/<metric>."""

    def go_on(self, first_step: int) -> None:
        """The run goes on with this step (0: it begins), which may be one that was logged before."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in run_dir/tensorboard. Curves are cut off where the run goes on."""

    def __init__(self, run_dir: Path) -> None:
        # Not torch.utils.tensorboard, around the same writer: torch takes two seconds to import.
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
    """One W&B run a process; a resumed run is another of the same group, so the curves lie over each other.

    W&B takes each step once and in order. Those that are repeated after the loss of a learner are left out.
    """

    def __init__(self, run_dir: Path, project: str) -> None:
        import wandb

        config = read_config(run_dir)
        self._run = wandb.init(project=project, dir=str(run_dir), config=config, group=run_dir.resolve().name)
        self._last = -1

    def go_on(self, first_step: int) -> None:
        """Nothing to do."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self._last:  # a step's metrics and its evaluations come one after the other
            self._run.log(metrics, step=step)
            self._last = step

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """One MLflow run a process, named after the run directory, on the server MLFLOW_TRACKING_URI names."""

    def __init__(self, run_dir: Path, experiment: str) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(experiment)
        mlflow.start_run(run_name=run_dir.resolve().name)
        if (run_dir / "config.yaml").exists():
            mlflow.log_artifact(str(run_dir / "config.yaml"))

    def go_on(self, first_step: int) -> None:
        """Nothing to do: MLflow keeps both values of a step that is repeated."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # It takes no @ in a name, as of pass@8.
        named = {name.replace("@", "_at_"): value for name, value in metrics.items()}
        # Not synchronous: a training step does not wait for a server, nor end because it is away.
        self._mlflow.log_metrics(named, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


class Sinks:
    """The sinks that the configuration asks for, from the beginning of a process's work to its end."""

    def __init__(self, run_dir: Path, monitoring: MonitoringConfig, notice: Callable[[str], None]) -> None:
        """notice: takes the sentence about a sink that fails."""
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
        """The run begins (0), or goes on with this step, which may be one that was logged before."""
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
            except Exception as error:  # noqa: BLE001 - another's library, with a server behind it, may raise anything
                del self._sinks[name]
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        why = f"{type(error).__name__}: {error}".strip(": \n").splitlines()[0]
        self._notice(
            f"{name} fails ({why}) and is switched off until the run is started again; metrics.jsonl has everything"
        )
