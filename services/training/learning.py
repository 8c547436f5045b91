"""One optimizer step on a batch, which is made again if a part of it was lost with an engine or a node."""

from collections.abc import Callable
from pathlib import Path

from sdft.learner.group import LearnerGroup, SequencesLost
from sdft.learner.types import StepResult
from sdft.services.base.errors import RunFailed
from sdft.services.records.batches import write_batch
from sdft.services.training.calls import fetched
from sdft.services.training.rollouts import TRIES, Batch, Rollouts


async def learn(
    learner: LearnerGroup, batch: Batch, rollouts: Rollouts, recorded: Path | None, note: Callable[[str], None]
) -> tuple[Batch, StepResult]:
    """Take a step, and return the batch that it was taken on.

    recorded: the run directory to write the batch to; its values then pass through this process. None: each rank
    fetches its own. Raises RunFailed if the batch is lost TRIES times in a row.
    """
    lost: SequencesLost | None = None
    for attempt in range(TRIES):
        if attempt:
            batch = await rollouts.again(batch.step)
        try:
            if recorded is None:
                return batch, await learner.train_step(batch.drafts)
            sequences = await fetched(batch.drafts)  # what is recorded is what is trained
            write_batch(recorded, batch.step, sequences)
            return batch, await learner.train_step(sequences)
        except SequencesLost as error:
            lost = error
            note(f"step {batch.step}: {lost}; the batch is made again")
    raise RunFailed(f"step {batch.step}: {lost}, {TRIES} times in a row") from lost
