"""The versions of the weights: how old they may be, and that a strict run repeats its bits."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdft.services.config.run import RunConfig


def check(run: "RunConfig") -> None:
    """Raise ValueError, with the mend, unless versions are as new as they must be."""
    if run.weights.sync_every > run.training.max_staleness + 1:
        raise ValueError(
            f"weights.sync_every {run.weights.sync_every} lets rollouts be {run.weights.sync_every - 1} steps "
            f"behind; set training.max_staleness to {run.weights.sync_every - 1}, or weights.sync_every to "
            f"{run.training.max_staleness + 1}"
        )
    grows = [name for name, pool in run.actors.pools.items() if pool.most > pool.replicas]
    if grows and run.strict:
        raise ValueError(
            f"actors.{grows[0]}.max_replicas lets the number of engines change, which would change the bits of a "
            f"strict run; set training.max_staleness to 1 or more, or remove max_replicas"
        )
    teacher_every, retention = run.weights.teacher_sync_every, run.retention
    saved = {"checkpoint.every": run.checkpoint.every}
    if retention is not None and retention.action == "stop" and run.evaluation.every:
        saved["evaluation.every"] = run.evaluation.every  # the guard saves a checkpoint where it stops the run
    for key, every in saved.items():
        if run.strict and run.teacher.weights == "ema" and every % teacher_every:
            raise ValueError(
                f"{key} {every} must be a multiple of weights.teacher_sync_every {teacher_every}, or a run resumed "
                f"from a checkpoint has a newer teacher than an uninterrupted run"
            )
    stops = retention is not None and retention.action == "stop" and retention.detectors is not None
    if run.strict and run.teacher.weights == "ema" and stops and teacher_every > 1:
        raise ValueError(
            f"retention.detectors stop the run at any step, so weights.teacher_sync_every {teacher_every} must be "
            f"1, or a run resumed from there has a newer teacher; change it, or retention.action"
        )
