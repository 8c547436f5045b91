"""Check that the packages of the configured monitoring sinks are installed."""

from importlib.util import find_spec

from sdft.services.base.errors import UserError
from sdft.services.config.sections import MonitoringConfig


def check_sinks(monitoring: MonitoringConfig) -> None:
    """Raise UserError if a configured sink is not installed. Must be called before any process starts."""
    sinks = {
        "tensorboard": ("monitoring.tensorboard", monitoring.tensorboard, "false"),
        "wandb": ("monitoring.wandb_project", monitoring.wandb_project, "null"),
        "mlflow": ("monitoring.mlflow_experiment", monitoring.mlflow_experiment, "null"),
    }
    for package, (key, value, off) in sinks.items():
        # find_spec also finds a plain folder of this name (W&B leaves a wandb/ behind), but its spec has no origin.
        if value and ((spec := find_spec(package)) is None or spec.origin is None):
            raise UserError(
                f"{key} is set, but {package} is not installed; run `pip install {package}`, or set {key}: {off}"
            )
