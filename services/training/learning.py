"""One optimizer step on a batch, which is made again if a part of it was lost with an engine or a node.

Engines that sleep leave their GPU memory to the learner meanwhile.
"""

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from sdft.actors.shared.drafts import Draft
from sdft.actors.shared.sequences import TrainingSequence
from sdft.learner.group import LearnerGroup, SequencesLost
from sdft.learner.types import StepResult
from sdft.services.base.errors import RunFailed
from sdft.services.fleet.pool import EnginePool
from sdft.services.records.batches import write_batch
from sdft.services.training.calls import fetched
from sdft.services.training.rollouts import TRIES, Batch, Rollouts


async def learn(
    learner: LearnerGroup,
    pools: Sequence[EnginePool],
    batch: Batch,
    rollouts: Rollouts,
    recorded: Path | None,
    note: Callable[[str], None],
) -> tuple[Batch, StepResult]:
    """Take a step, and return the batch that it was taken on.

    pools: their engines may sleep meanwhile. recorded: the run directory to write the batch to; its values then pass
    through this process. None: each rank fetches its own. Raises RunFailed if the batch is lost TRIES times in a row.
    """
    lost: SequencesLost | None = None
    for attempt in range(TRIES):
        if attempt:
            batch = await rollouts.again(batch.step)
        try:
            sequences: Sequence[Draft | TrainingSequence] = batch.drafts
            if recorded is not None:
                values = await fetched(batch.drafts)  # what is recorded is what is trained
                write_batch(recorded, batch.step, values)
                sequences = values
            async with AsyncExitStack() as asleep:
                for pool in pools:
                    await asleep.enter_async_context(pool.asleep())
                return batch, await learner.train_step(sequences)
        except SequencesLost as error:
            lost = error
            note(f"step {batch.step}: {lost}; the batch is made again")
    raise RunFailed(f"step {batch.step}: {lost}, {TRIES} times in a row") from lost
