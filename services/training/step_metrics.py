"""The metrics of one step, from its batch, the learner's result and the times."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdft.learner.completions import Watched
from sdft.learner.config import LossConfig
from sdft.learner.types import StepResult
from sdft.services.records.rows import StepMetrics
from sdft.services.training.completions import completion_figures
from sdft.services.training.rollouts import Batch, Times


@dataclass(frozen=True)
class Counts:
    """Samples since the start of the run, by what became of them."""

    trained: int
    dropped: int
    in_flight: int


def step_metrics(
    batch: Batch,
    result: StepResult,
    losses: Sequence[LossConfig],
    counts: Counts,
    times: Times,
    took: float,
    strict: bool,
    watched: Watched,
) -> StepMetrics:
    """Return the metrics of a step.

    losses, watched: those of the stage. times: seconds of the controller's phases in this step, which took `took`
    seconds. strict: the wait for the batch is its rollouts and scores; otherwise it was made beside earlier steps, and
    the wait counts as one.
    """
    waited, synced = took - sum(times.seconds.values()), times.seconds["sync"]
    if strict:
        synced += batch.times.seconds["sync"]
    else:
        waited += times.seconds["batch"]
    drafts, staleness = batch.drafts, batch.staleness
    completion_tokens = sum(draft.sampled_tokens for draft in drafts)
    figures = completion_figures(drafts, result.completions, watched)
    return StepMetrics(
        step=batch.step,
        stage=drafts[0].sample.stage,
        loss=result.loss,
        divergence=result.divergence,
        direction=" and ".join(dict.fromkeys(loss.name for loss in losses)),
        grad_norm=result.grad_norm,
        lr=result.lr,
        samples=len(batch.samples),
        prompt_tokens=sum(map(len, drafts)) - completion_tokens,
        completion_tokens=completion_tokens,
        student_version=max(draft.newest_version for draft in drafts),
        teacher_version=min((v for draft in drafts if (v := draft.teacher_version) is not None), default=0),
        staleness_mean=float(np.mean(staleness)),
        staleness_max=max(staleness),
        mismatch_kl=result.mismatch_kl,
        tail_mass=result.tail_mass,
        time_rollout_s=batch.times.seconds["rollout"],
        time_score_s=batch.times.seconds["score"],
        time_learn_s=times.seconds["learn"],
        time_sync_s=synced,
        time_wait_s=max(0.0, waited),
        time_step_s=took,
        tokens_per_s=completion_tokens / took,
        trained=counts.trained,
        dropped=counts.dropped,
        in_flight=counts.in_flight,
        loss_tokens=result.loss_tokens,
        clipped=result.clipped,
        loss_entropy=result.loss_entropy,
        **vars(figures),
    )
