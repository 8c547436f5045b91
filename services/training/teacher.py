"""The teacher's weights of a run: when they change, and when the teacher engines get them.

    all       at the start of a stage
    ema       after a step, every weights.teacher_sync_every steps
    gated     every teacher.refresh_every steps of a stage, if the guard has found nothing since the last time:

        steps      ... │ refresh_every │ refresh_every │ refresh_every │ ...
        the guard              -             drifted           -
        teacher            refreshed         refused       refreshed             an event each

Live and external weights are not delivered. What a resumed run knows of refreshes is in events.jsonl, and the weights
are in the checkpoint.
"""

from pathlib import Path

from sdft.learner.group import LearnerGroup
from sdft.services.config.run import TaskConfig
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.prepared import Prepared
from sdft.services.records.rows import Event, read_rows
from sdft.services.training.guard import Guard
from sdft.services.training.weight_sync import WeightSync


class Teacher:
    """The teacher of a run."""

    def __init__(
        self,
        prepared: Prepared,
        run_dir: Path,
        sync: WeightSync | None,
        learner: LearnerGroup,
        guard: Guard,
        log: RunLog,
        progress: Progress,
    ) -> None:
        """sync: delivers its weights to the teacher engines; None: they are live or external."""
        self._prepared, self._sync, self._learner, self._guard = prepared, sync, learner, guard
        self._log, self._progress = log, progress
        self._config = prepared.config
        decided = [event for event in read_rows(run_dir, Event) if event.kind in ("refreshed", "refused")]
        self._decided = max((event.step for event in decided), default=0)
        self._refreshed = max((event.step for event in decided if event.kind == "refreshed"), default=0)

    def version(self, step: int) -> int:
        """Return the version of the weights after `step`: the step whose student they come from."""
        if self._config.teacher.weights == "ema":
            return step
        return max(self._prepared.schedule.at(step).before, self._refreshed)

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

    def is_refreshed_after(self, step: int) -> bool:
        """Whether a refresh of a gated teacher is due after a step."""
        before, every = self._prepared.schedule.at(step).before, self._config.teacher.refresh_every
        due = every is not None and (step - before) % every == 0
        return self._sync is not None and due and self._scores_after(step)

    async def refresh(self, step: int) -> None:
        """Refresh a gated teacher after a step, its evaluation and the guard, if it is due and everything held."""
        if self._sync is None or not self.is_refreshed_after(step):
            return
        stage = self._prepared.schedule.at(step)
        broken = self._guard.broken_since(max(stage.before, self._decided))
        self._decided = step
        if broken:
            text = "; ".join(broken)
            self._log.event(Event(step, stage.stage, "refused", text))
            self._progress.note(f"the teacher is not refreshed after step {step}: {text}")
            return
        await self._learner.refresh_teacher()
        self._refreshed = step
        text = f"the teacher is the student of step {step}"
        self._log.event(Event(step, stage.stage, "refreshed", text))
        self._progress.note(text)
        await self._sync.publish(step)

    def _scores_after(self, step: int) -> bool:
        """Whether the teacher scores for a later step of the same stage."""
        config = self._prepared.at(step).config
        return step != self._prepared.schedule.at(step).last and config.method.teacher_scores
