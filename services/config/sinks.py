"""The packages of the monitoring sinks that a configuration asks for are installed."""

from importlib.util import find_spec

from sdft.services.base.errors import UserError
from sdft.services.config.sections import MonitoringConfig


def check_sinks(monitoring: MonitoringConfig) -> None:
    """UserError if a sink the configuration asks for is not installed. To be called before anything starts."""
    asked = {
        "tensorboard": ("monitoring.tensorboard", monitoring.tensorboard),
        "wandb": ("monitoring.wandb_project", monitoring.wandb_project),
        "mlflow": ("monitoring.mlflow_experiment", monitoring.mlflow_experiment),
    }
    for package, (key, value) in asked.items():
        # A mere folder of this name (W&B leaves a wandb/ behind) is found too, but has no origin.
        if value and ((spec := find_spec(package)) is None or spec.origin is None):
            raise UserError(f"{key} is set, but {package} is not installed: pip install {package}, or remove the key")
