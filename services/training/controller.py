"""The training loop: take a batch, learn, publish, evaluate, save.

    strict (max_staleness 0)
        engines    │ sample t │ score t │         │ update │ sample t+1 │ ...
        learner    │          │         │ step t  │        │            │ ...
        teacher engines load their new weights while the student engines sample; on GPUs the learner also publishes them
        meanwhile.

    ahead (max_staleness n)
        engines    │ sample and score t+1 ... t+n, each prompt by itself          │ ...
        learner    │ step t │ publish │ step t+1 │ publish │ ...
        An engine loads new weights between two decoding steps; its rollouts continue with them.

What waits for what:
    a step begins             when the source of its stage has the records of its batch (arrivals.py)
    a batch begins            when the student engines hold weights at most n steps old (rollouts.py)
    a batch is scored         when the teacher engines hold the weights that were sent last (weight_sync.py)
    the learner steps         when the batch is scored
    the metrics of a step     follow the checkpoint of the step before onto the disk (checkpointer.py)
    evaluation, save          between two steps, on engines that hold the weights of the step (evaluations.py,
                              checkpointer.py)
    a teacher is refreshed    after the evaluation of the step and the guard, before it is saved (teacher.py)

The controller holds drafts: lengths and references, but no tokens (actors/shared/drafts.py). It owns no model.
"""

from collections.abc import Mapping
from pathlib import Path

from sdft.actors.roles import STUDENT, TEACHER, evaluating, teacher_pool
from sdft.learner.group import LearnerGroup
from sdft.services.config.run import TaskConfig
from sdft.services.data.schedule import StageSchedule
from sdft.services.fleet.autoscaler import Autoscaler
from sdft.services.fleet.pool import EnginePool
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.prepared import Prepared
from sdft.services.records.checkpoints import folder_of
from sdft.services.records.ledger import Ledger
from sdft.services.records.rows import StepMetrics
from sdft.services.training.accounting import Accounting
from sdft.services.training.arrivals import Arrivals
from sdft.services.training.calls import now
from sdft.services.training.checkpointer import Checkpointer
from sdft.services.training.evaluations import Evaluations
from sdft.services.training.guard import Guard
from sdft.services.training.learning import learn
from sdft.services.training.rollouts import Rollouts, Times
from sdft.services.training.step_metrics import Counts, step_metrics
from sdft.services.training.teacher import Teacher
from sdft.services.training.weight_sync import WeightSync


class Controller:
    """The loop of steps of one run, from its first step, or the one it resumes at, to its last."""

    def __init__(
        self,
        prepared: Prepared,
        run_dir: Path,
        pools: Mapping[str, EnginePool],
        learner: LearnerGroup,
        ledger: Ledger,
        log: RunLog,
        progress: Progress,
    ) -> None:
        """pools: the started pools by role, those of teachers by name."""
        self._prepared = prepared
        self._config = prepared.config
        self._run_dir = run_dir
        self._pools = list(pools.values())
        self._students = pools[STUDENT]
        routes = {route: teacher_pool(route) for route in self._config.teacher_in_use.routes}
        self._teachers = {route: pools[name] for route, name in routes.items() if name in pools}
        self._live = not self._teachers  # the student engines score
        if self._live:
            self._teachers = {"": self._students}
        self._learner = learner
        self._ledger = ledger
        self._log = log
        self._progress = progress
        limit = self._config.weights.timeout_s
        external = self._config.teacher_in_use.weights == "external"  # its engines keep the weights that they load
        self._weights = {
            role: WeightSync(role, pool, learner, limit, progress.note)
            for role, pool in pools.items()
            if not (external and role in routes.values())
        }
        self._student_weights = self._weights[STUDENT]
        self._evaluated_weights = self._weights[evaluating(pools)]
        self._autoscaler = Autoscaler(pools.values())
        self._checkpoints = Checkpointer(prepared, run_dir, learner, ledger, progress)
        evaluated = pools[evaluating(pools)]
        teachers = self._teachers if external else {"": evaluated}  # else the first teacher is the first student
        self._guard = Guard(prepared, run_dir, self._checkpoints, log, progress)
        self._teacher = Teacher(prepared, run_dir, self._weights.get(TEACHER), learner, self._guard, log, progress)
        self._evaluations = Evaluations(prepared, run_dir, evaluated, teachers, self._guard, log, progress)
        self._accounting = Accounting(ledger, progress.note)
        self._arrivals = Arrivals(prepared, run_dir, progress)
        self.steps_done = 0

    async def run(self, first_step: int) -> None:
        """Train to the end, from the state after optimizer step `first_step` (0: from the base model)."""
        schedule = self._prepared.schedule
        student = self._student_weights
        teachers_ready = self._teacher.ready
        rollouts = Rollouts(self._prepared, self._students, self._teachers, self._ledger, teachers_ready, first_step)
        try:
            # Unconditional: after a resume the engines hold the base model, and learner and engines would wait for each
            # other.
            gap = await student.deliver(first_step)
            if gap is not None:
                self._progress.note(
                    f"student weights v{first_step} verified: the probe's log-probs of engine and learner differ by "
                    f"{gap:.4f} (mean relative difference)"
                )
            for role, weights in self._weights.items():
                if weights is not student:
                    await weights.deliver(self._teacher.version(first_step) if role == TEACHER else first_step)
            await self._evaluations.first(first_step)
            if not self._config.strict:
                student.on_delivered = rollouts.begin
            step, ended = first_step, False
            while await self._arrivals.wait(step + 1):
                step += 1
                stage = schedule.at(step)
                if step == stage.before + 1 and step > 1:
                    await self._begin_stage(stage)
                rollouts.open(stage)
                metrics = await self._step(step, rollouts)
                ended = step == stage.last
                if ended or self._evaluates_after(step):
                    await self._evaluate(step)
                await self._guard.stepped(metrics)
                await self._teacher.refresh(step)
                if ended or self._saves_after(step):
                    await self._checkpoints.save(step, self._guard.held)
            if not ended:
                await self._end_late(step)
            await self._checkpoints.saved()
            await self._teacher.ready()
        finally:
            await rollouts.stop()
            await self._checkpoints.stop()
            for weights in self._weights.values():
                await weights.stop()

    async def _evaluate(self, step: int) -> None:
        await self._evaluated_weights.wait_for_version(step, step)
        await self._evaluations.after(step)

    async def _end_late(self, step: int) -> None:
        """End the run with `step`, behind whose records its source was closed after the step had been taken."""
        await self._evaluate(step)
        await self._checkpoints.saved()
        if not folder_of(self._run_dir, step).exists():
            await self._checkpoints.save(step, self._guard.held)

    async def _begin_stage(self, stage: StageSchedule) -> None:
        """Prepare learner and engines for the first batch of a stage."""
        step, config = stage.before, self._prepared.stages[stage.stage].config
        self._progress.note(f"stage {stage.stage + 1}, {self._prepared.stages[stage.stage].name}: from step {step + 1}")
        await self._learner.begin_stage()
        if self._follows(config):
            await self._student_weights.wait_for_version(step, step)
        await self._teacher.begin_stage(step, config)

    def _follows(self, config: TaskConfig) -> bool:
        """Return whether the student engines need new weights: they sample, or score as the live teacher."""
        return config.method.student_samples or (self._live and config.method.teacher_scores)

    def _evaluates_after(self, step: int) -> bool:
        every = self._config.evaluation.every
        return every is not None and step % every == 0

    def _saves_after(self, step: int) -> bool:
        return step % self._config.checkpoint.every == 0

    def _samples_next(self, step: int) -> bool:
        """Whether a strict run begins the next rollouts before the teacher's weights are published.

        On a CPU the processes of a strict run compute one after the other. Rollouts are in no checkpoint, and not
        beside an evaluation. A refresh of the teacher comes later than this.
        """
        ended = step == self._prepared.schedule.at(step).last
        due = self._evaluates_after(step) or self._saves_after(step) or self._teacher.is_refreshed_after(step)
        on_gpus = self._config.strict and self._config.device == "cuda"
        return on_gpus and self._follows(self._prepared.at(step).config) and not (ended or due)

    async def _step(self, step: int, rollouts: Rollouts) -> StepMetrics:
        times = Times()
        began = now()
        stage, student = self._prepared.at(step), self._student_weights
        config, every = stage.config, self._config.weights
        rollouts.begin(student.version if self._follows(config) else step - 1)
        if rollouts.begun < step:
            needed = step - 1 - self._config.training.max_staleness
            await times.of("sync", student.wait_for_version(max(0, needed), step - 1))
        batch = await times.of("batch", rollouts.take(step))
        recorded = self._run_dir if self._config.monitoring.record_rollouts else None
        work = learn(self._learner, self._pools, batch, rollouts, recorded, self._progress.note)
        batch, result = await times.of("learn", work)
        self._accounting.step(step, batch.samples, result.applied)
        await times.of("sync", student.wait_delivered())
        counts = Counts(*self._ledger.audit(self._prepared.schedule.issued_through(rollouts.begun)))
        if step % every.sync_every == 0 and self._follows(config):
            await times.of("sync", student.deliver(step) if self._config.strict else student.publish(step))
        if self._samples_next(step):
            rollouts.begin(student.version)  # their scores wait for the delivery that begins below
        await times.of("sync", self._teacher.follow(step))
        # Before the metrics are written: each step in them follows a checkpoint that is on the disk.
        await self._checkpoints.saved()
        took = now() - began
        strict, losses = self._config.strict, config.method.losses
        metrics = step_metrics(batch, result, losses, counts, times, took, strict, stage.watched)
        self._log.step(metrics)
        self._progress.step(metrics)
        self.steps_done += 1
        self._autoscaler.after_step(metrics.time_wait_s / metrics.time_step_s)
        return metrics
