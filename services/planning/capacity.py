"""Check that a run fits this machine's memory and the disk of its run directory."""

import shutil
from pathlib import Path

from sdft.actors.shared.process import available_memory_gib
from sdft.services.base.errors import PreflightError
from sdft.services.config.run import RunConfig
from sdft.services.planning.gpu_fit import check_gpu_memory
from sdft.services.planning.plan import Plan
from sdft.services.planning.prepared import Prepared

CHECKPOINT_BYTES_PER_PARAMETER = 20  # float32 masters, two moments, EMA, and the student in float32 at most


def check_memory(config: RunConfig, plan: Plan) -> None:
    """PreflightError if the plan does not fit this machine's memory or the GPUs'.

    Main memory is not checked on a running cluster or with GPUs.
    """
    check_gpu_memory(plan)
    free = available_memory_gib()
    if config.ray.running is None and config.device == "cpu" and plan.memory_gib > free:
        raise PreflightError(
            f"the run needs about {plan.memory_gib:.1f} GiB of memory, but {free:.1f} GiB are free here; lower "
            f"actors.*.kv_cache_gib, set teacher.weights: live (one engine fewer), or use a smaller model"
        )


def check_disk(prepared: Prepared, run_dir: Path) -> None:
    """PreflightError if the checkpoints do not fit the disk of the run directory, which must exist."""
    keep = prepared.config.checkpoint.keep + 1  # the newest is written before the oldest is removed
    shape = prepared.shape
    trained = shape.adapters or shape.parameters
    needed = (trained * CHECKPOINT_BYTES_PER_PARAMETER + 4 * shape.adapted) * keep
    disk = shutil.disk_usage(run_dir).free
    if needed > disk:
        raise PreflightError(
            f"{run_dir}: {keep} checkpoints take up to {needed / 1e9:.1f} GB, but {disk / 1e9:.1f} GB are free there; "
            f"free disk space, lower checkpoint.keep, or choose another --run-dir"
        )
