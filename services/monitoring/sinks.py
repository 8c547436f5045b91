"""Where metrics go beside the run's own files: TensorBoard, Weights & Biases, MLflow, Prometheus (prometheus.py)."""

import time
from pathlib import Path
from typing import Protocol

from sdft.services.config.sections import MonitoringConfig
from sdft.services.monitoring.prometheus import Prometheus
from sdft.services.records.settings import read_config


class Sink(Protocol):
    """One place that shows curves. Metric names are paths: train/loss, time/rollout_s, eval/<set>/<metric>."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in run_dir/tensorboard. `first_step`: curves of a killed run are cut off from there on."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        # Not torch.utils.tensorboard, around the same writer: torch takes two seconds to import.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=first_step, session_log=session))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run a process; a resumed run is another of the same group, so the curves lie over each other."""

    def __init__(self, run_dir: Path, project: str) -> None:
        import wandb

        config = read_config(run_dir)
        self._run = wandb.init(project=project, dir=str(run_dir), config=config, group=run_dir.resolve().name)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

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

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # It takes no @ in a name, as of pass@8.
        named = {name.replace("@", "_at_"): value for name, value in metrics.items()}
        # Not synchronous: a training step does not wait for a server, nor end because it is away.
        self._mlflow.log_metrics(named, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


def open_sinks(run_dir: Path, monitoring: MonitoringConfig, first_step: int) -> list[Sink]:
    """The sinks the configuration asks for. `first_step`: the step the run goes on with, 0 for a new run."""
    sinks: list[Sink] = []
    if monitoring.tensorboard:
        sinks.append(TensorBoard(run_dir, first_step))
    if monitoring.wandb_project:
        sinks.append(WeightsAndBiases(run_dir, monitoring.wandb_project))
    if monitoring.mlflow_experiment:
        sinks.append(MLflow(run_dir, monitoring.mlflow_experiment))
    if monitoring.prometheus:
        sinks.append(Prometheus(run_dir, first_step))
    return sinks
