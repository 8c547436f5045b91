"""The teacher's weights of a run: when they change, and when the teacher engines get them.

    ema       after a step, every weights.teacher_sync_every steps
    all       at the start of a stage

Live and external weights are not delivered.
"""

from sdft.services.config.run import TaskConfig
from sdft.services.planning.prepared import Prepared
from sdft.services.training.weight_sync import WeightSync


class Teacher:
    """The teacher of a run."""

    def __init__(self, prepared: Prepared, sync: WeightSync | None) -> None:
        """sync: delivers its weights to the teacher engines; None: they are live or external."""
        self._prepared, self._sync = prepared, sync
        self._config = prepared.config

    async def ready(self) -> None:
        """Wait until the teacher engines have the weights that were sent."""
        if self._sync is not None:
            await self._sync.wait_delivered()

    async def begin_stage(self, step: int, config: TaskConfig) -> None:
        """Deliver the weights with which the stage behind `step` begins. config: of that stage."""
        if self._sync is not None and config.method.teacher_scores:
            await self._sync.deliver(step)

    async def follow(self, step: int) -> None:
        """Send the average to the engines after a step, if it is due."""
        moves = self._config.teacher.weights == "ema" and step % self._config.weights.teacher_sync_every == 0
        if self._sync is not None and moves and self._scores_after(step):
            # Not awaited: the teacher engines load while the student engines sample the next rollouts.
            await self._sync.publish(step)

    def _scores_after(self, step: int) -> bool:
        """Whether the teacher scores for a later step of the same stage."""
        config = self._prepared.at(step).config
        return step != self._prepared.schedule.at(step).last and config.method.teacher_scores
