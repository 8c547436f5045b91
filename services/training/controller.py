"""The training loop: take a batch, learn, publish, evaluate, save.

    rollouts.py: batches -> learner: step -> snapshots -> student and teacher engines

The controller moves references and small arrays; it owns no model. With max_staleness 0 the batches are made one after
the other, each by the weights of the previous step: the strict algorithm. With more, the next batches are made while
the learner steps.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdft.actors.shared.types import SampleId
from sdft.learner.group import LearnerGroup
from sdft.services.algorithms.methods import loss_of, on_demonstrations, on_policy
from sdft.services.base.errors import RetentionLost, RunFailed, UserError
from sdft.services.config.run import TaskConfig
from sdft.services.data.schedule import StageSchedule
from sdft.services.data.sets import LoadedSet
from sdft.services.evaluation.evaluator import Evaluator
from sdft.services.evaluation.replies import write_replies
from sdft.services.fleet.autoscaler import Scaler, Seen
from sdft.services.fleet.pool import EnginePool
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.prepare import Prepared
from sdft.services.records import checkpoints
from sdft.services.records.batches import write_batch
from sdft.services.records.ledger import Ledger
from sdft.services.records.rows import EvalResult, Reply, StepMetrics, first_of_each_set, read_rows
from sdft.services.training.checkpointer import Checkpointer
from sdft.services.training.retention import RetentionGuard
from sdft.services.training.rollouts import Rollouts, Times, now
from sdft.services.training.weight_sync import WeightSync

MOST_NOT_FINITE = 8  # steps in a row without a finite gradient until the run fails


class Controller:
    """The loop of steps of one run, from its first step, or the one it resumes at, to its last."""

    def __init__(
        self,
        prepared: Prepared,
        run_dir: Path,
        students: EnginePool,
        teachers: EnginePool | None,
        learner: LearnerGroup,
        ledger: Ledger,
        log: RunLog,
        progress: Progress,
    ) -> None:
        self._prepared = prepared
        self._config = prepared.config
        self._run_dir = run_dir
        self._students = students
        self._teachers = teachers  # None: the teacher's weights are live, and the student engines score
        self._learner = learner
        self._ledger = ledger
        self._log = log
        self._progress = progress
        self._evaluator = Evaluator(prepared.tokenizer, self._config.evaluation.grading_timeout_s, progress.part)
        earlier = read_rows(run_dir, EvalResult)
        self._guard = RetentionGuard(self._config, earlier)
        evaluated = {result.task for result in earlier}
        self._not_evaluated = [loaded for loaded in prepared.sets if loaded.settings.name not in evaluated]
        self._student_weights = self._weights("student", students)
        self._teacher_weights = None if teachers is None else self._weights("teacher", teachers)
        pools = [pool for pool in (students, teachers) if pool is not None and not pool.settings.strict]
        self._scalers = [(pool, Scaler(pool.settings.least, pool.settings.most)) for pool in pools]
        self._checkpoints = Checkpointer(prepared, run_dir, learner, ledger, progress)
        self._not_finite = 0  # steps in a row without a finite gradient, so far
        self._teacher_moves = self._config.teacher.weights == "ema"

    def _weights(self, role: str, pool: EnginePool) -> WeightSync:
        return WeightSync(role, pool, self._learner, self._config.weights.timeout_s, self._progress.note)

    async def run(self, first_step: int) -> None:
        """Train to the end, from the state after optimizer step `first_step` (0: from the base model)."""
        schedule, every = self._prepared.schedule, self._config.evaluation.every
        scoring = self._teachers or self._students
        student, teacher = self._student_weights, self._teacher_weights
        rollouts = Rollouts(self._prepared, self._students, scoring, self._ledger, self._teachers_ready, first_step)
        try:
            # Unconditional: after a resume the engines hold the base model, and learner and engines would wait for each
            # other.
            gap = await student.deliver(first_step)
            if gap is not None:
                self._progress.note(
                    f"student weights v{first_step} verified: the probe's log-probs of engine and learner differ by "
                    f"{gap:.4f} (mean relative difference)"
                )
            if teacher is not None:
                await teacher.deliver(first_step)
            # The first results precede training. Sets added to a run are evaluated before it resumes.
            await self._evaluate(first_step, self._not_evaluated, teachers=True)
            if not self._config.strict:
                student.on_delivered = rollouts.begin
            for step in range(first_step + 1, schedule.total_steps + 1):
                stage = schedule.at(step)
                if step == stage.before + 1 and step > 1:
                    await self._begin_stage(stage)
                rollouts.open(stage)
                await self._step(step, rollouts)
                if step == stage.last or (every and step % every == 0):
                    await student.wait_for_version(step, step)
                    sets = [*self._prepared.common, *self._prepared.stages[stage.stage].sets]
                    await self._evaluate(step, self._prepared.sets if step == stage.last else sets)
                if step == stage.last or step % self._config.checkpoint.every == 0:
                    await self._checkpoints.save(step, self._guard.held)
            await self._checkpoints.saved()
            await self._teachers_ready()
        finally:
            await rollouts.stop()
            await self._checkpoints.stop()
            for weights in (student, teacher):
                if weights is not None:
                    await weights.stop()

    async def _begin_stage(self, stage: StageSchedule) -> None:
        """Prepare learner and engines for the first batch of a stage."""
        step, config = stage.before, self._prepared.stages[stage.stage].config
        self._progress.note(f"stage {stage.stage + 1}, {self._prepared.stages[stage.stage].name}: from step {step + 1}")
        await self._learner.begin_stage()
        if self._follows(config):
            await self._student_weights.wait_for_version(step, step)
        if self._teacher_weights is not None and not on_demonstrations(config):
            await self._teacher_weights.deliver(step)

    def _follows(self, config: TaskConfig) -> bool:
        """Return whether the student engines need new weights: they sample, or score as the live teacher."""
        return on_policy(config) or (self._teachers is None and not on_demonstrations(config))

    async def _step(self, step: int, rollouts: Rollouts) -> None:
        times = Times()
        began = now()
        stage, config = self._prepared.schedule.at(step), self._prepared.at(step).config
        student, teacher, every = self._student_weights, self._teacher_weights, self._config.weights
        rollouts.begin(student.version if self._follows(config) else step - 1)
        if rollouts.begun < step:
            needed = step - 1 - self._config.training.max_staleness
            await times.of("sync", student.wait_for_version(max(0, needed), step - 1))
        batch = await rollouts.take(step)
        samples, ids = batch.samples, [s.sample for s in batch.samples]
        if self._config.monitoring.record_rollouts:
            write_batch(self._run_dir, step, samples)
        newest_version = max(v for s in samples for v, _, _ in s.rollout.versions)
        result = await times.of("learn", self._learner.train_step(samples))
        self._account(step, ids, result.applied)
        await times.of("sync", student.wait_delivered())
        trained, dropped, in_flight = self._ledger.audit(self._prepared.schedule.issued_through(rollouts.begun))
        if step % every.sync_every == 0 and self._follows(config):
            await times.of("sync", student.deliver(step) if self._config.strict else student.publish(step))
        scored = self._teacher_moves and step < stage.last and not on_demonstrations(config)
        if teacher is not None and scored and step % every.teacher_sync_every == 0:
            # Not awaited: the teacher engines load while the student engines sample the next rollouts.
            await times.of("sync", teacher.publish(step))
        # Before the metrics are written: each step in them follows a checkpoint that is on the disk.
        await self._checkpoints.saved()
        took = now() - began
        waited = took - sum(times.seconds.values())
        if self._config.strict:  # the batch was made within the step
            waited -= sum(batch.times.seconds.values())
            times.seconds["sync"] += batch.times.seconds["sync"]
        completion_tokens = sum(len(s.rollout.completion_ids) for s in samples)
        metrics = StepMetrics(
            step=step,
            stage=ids[0].stage,
            loss=result.loss,
            divergence=result.divergence,
            direction=loss_of(config).divergence,
            grad_norm=result.grad_norm,
            lr=result.lr,
            samples=len(samples),
            prompt_tokens=sum(len(s.rollout.prompt_ids) for s in samples),
            completion_tokens=completion_tokens,
            student_version=newest_version,
            teacher_version=min(s.scores.version for s in samples),
            staleness_mean=float(np.mean(batch.staleness)),
            staleness_max=max(batch.staleness),
            mismatch_kl=result.mismatch_kl,
            tail_mass=result.tail_mass,
            time_rollout_s=batch.times.seconds["rollout"],
            time_score_s=batch.times.seconds["score"],
            time_learn_s=times.seconds["learn"],
            time_sync_s=times.seconds["sync"],
            time_wait_s=max(0.0, waited),
            time_step_s=took,
            tokens_per_s=completion_tokens / took,
            trained=trained,
            dropped=dropped,
            in_flight=in_flight,
            loss_tokens=result.loss_tokens,
        )
        self._log.step(metrics)
        self._progress.step(metrics)
        self._scale(metrics)

    def _account(self, step: int, ids: list[SampleId], applied: bool) -> None:
        """Mark the samples of a step as trained, or as dropped if the gradient was not finite and changed no weight.

        Raises RunFailed after MOST_NOT_FINITE steps without a finite gradient in a row.
        """
        if applied:
            self._not_finite = 0
            self._ledger.advance(ids, "trained")
            return
        for sample in ids:
            self._ledger.drop(sample, "the step's gradient was not finite")
        self._not_finite += 1
        text = f"step {step}: the gradient is not finite; no weight changed, and its {len(ids)} samples are dropped"
        self._progress.note(text)
        if self._not_finite == MOST_NOT_FINITE:
            raise RunFailed(
                f"{text}; this is step {MOST_NOT_FINITE} in a row without a finite gradient; export the last "
                f"checkpoint with `sdft export`, and start a new run from it with a lower learner.optimizer.lr or with "
                f"dtype: float32"
            )

    def _scale(self, metrics: StepMetrics) -> None:
        """Resize the pools: grow while the learner waits for samples, shrink while engines are idle."""
        for pool, scaler in self._scalers:
            waited = metrics.time_wait_s / metrics.time_step_s
            seen = Seen(waited, pool.busy(), pool.queued)
            if not pool.changing:
                pool.resize(scaler.wanted(pool.size, seen))

    async def _teachers_ready(self) -> None:
        if self._teacher_weights is not None:
            await self._teacher_weights.wait_delivered()

    async def _evaluate(self, step: int, sets: Sequence[LoadedSet], teachers: bool = False) -> None:
        """Evaluate the sets and log the results. teachers: also with demonstrations in the prompt, if there are any."""
        if not sets:
            return
        self._progress.phase(f"evaluating at step {step}")
        stage = self._prepared.schedule.at(step).stage
        results, replies = await self._evaluator.students(self._students, sets, step, stage)
        if teachers:
            results += await self._evaluator.teachers(self._students, sets, step, stage)
        # Replies before results: if the run is killed in between, the evaluation has no results and is repeated.
        for reply in first_of_each_set(replies):
            self._log.reply(reply)
        self._log.evaluation(*results)
        self._progress.evaluation(results)
        await self._judge(step, results, replies)
        self._progress.phase("training")

    async def _judge(self, step: int, results: list[EvalResult], replies: list[Reply]) -> None:
        """Apply the retention guard. On a breach: warn, or save and raise RetentionLost to stop or roll back."""
        breaches, retention = self._guard.judge(results), self._config.retention
        if not breaches or retention is None:
            return
        fallen = {breach.now.task for breach in breaches}
        path = self._run_dir / f"retention-step-{step:06d}.jsonl"
        where = f"are in {path.name}"
        try:
            write_replies(path, [b.now for b in breaches], [r for r in replies if r.task in fallen])
        except OSError as error:  # the guard's action does not depend on this file
            where = f"could not be written ({error})"
        text = f"retention guard: {'; '.join(map(str, breaches))}; the replies {where}"
        self._progress.note(text)
        if retention.action == "warn":
            return
        await self._checkpoints.save(step, self._guard.held)
        await self._checkpoints.saved()
        if retention.action == "stop":
            raise RetentionLost(f"{text}; stopped at a checkpoint of this step; the same command continues from it")
        held = self._guard.held or 0
        try:
            checkpoints.set_aside(self._run_dir, held)
        except UserError as error:
            raise RetentionLost(f"{text}; it held at step {held}, and the run is not rolled back: {error}") from error
        good, _ = checkpoints.newest(self._run_dir)
        where = "the base model, because no checkpoint had been saved" if good is None else good.name
        raise RetentionLost(
            f"{text}; rolled back to {where}; the guarded sets last held at step {held}, and later checkpoints are set "
            f"aside as checkpoints/aside-*; to train with other settings, start a new run from the model that "
            f"`sdft export {self._run_dir}` writes"
        )
