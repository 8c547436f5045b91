"""The evaluations of a run: replies and results are logged, and the retention guard acts on them.

engines -> evaluator: results, replies -> samples.jsonl, eval.jsonl -> guard: warn, stop or roll back
"""

from collections.abc import Sequence
from pathlib import Path

from sdft.services.base.errors import RetentionLost, UserError
from sdft.services.data.sets import LoadedSet
from sdft.services.evaluation.evaluator import Evaluator
from sdft.services.evaluation.replies import write_replies
from sdft.services.fleet.pool import EnginePool
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.prepared import Prepared
from sdft.services.records import checkpoints
from sdft.services.records.rows import EvalResult, Reply, first_of_each_set, read_rows
from sdft.services.training.checkpointer import Checkpointer
from sdft.services.training.retention import RetentionGuard


class Evaluations:
    """Evaluates sets between two steps, on the pool `engines`, which holds the student's weights of the step.

    The first evaluation is also one of the teacher, on the pool `teachers`.
    """

    def __init__(
        self,
        prepared: Prepared,
        run_dir: Path,
        engines: EnginePool,
        teachers: EnginePool,
        saving: Checkpointer,
        log: RunLog,
        progress: Progress,
    ) -> None:
        self._prepared, self._run_dir = prepared, run_dir
        self._engines, self._teachers, self._saving = engines, teachers, saving
        self._log, self._progress = log, progress
        self._evaluator = Evaluator(prepared.tokenizer, prepared.config.evaluation.grading_timeout_s, progress.part)
        earlier = read_rows(run_dir, EvalResult)
        self._guard = RetentionGuard(prepared.config, earlier)
        self._evaluated: dict[str, int] = {result.task: result.step for result in earlier}  # set -> its last step
        self._new = [loaded for loaded in prepared.sets if loaded.settings.name not in self._evaluated]

    @property
    def held(self) -> int | None:
        """The last step at which all guarded sets held; None if there is none."""
        return self._guard.held

    async def first(self, step: int) -> None:
        """Evaluate the sets without any result, by student and teacher: all before training, later the added ones."""
        await self._evaluate(step, self._new, teachers=True)

    async def after(self, step: int) -> None:
        """Evaluate after a step: at the end of a stage all sets, otherwise those of the stage and of the run.

        Sets that have results of this step are left out: a source may be closed after the evaluation of a step, which
        then ends the stage.
        """
        stage = self._prepared.schedule.at(step)
        own = [*self._prepared.common, *self._prepared.stages[stage.stage].sets]
        sets = self._prepared.sets if step == stage.last else own
        await self._evaluate(step, [s for s in sets if self._evaluated.get(s.settings.name) != step])

    async def _evaluate(self, step: int, sets: Sequence[LoadedSet], teachers: bool = False) -> None:
        if not sets:
            return
        self._progress.phase(f"evaluating at step {step}")
        stage = self._prepared.schedule.at(step).stage
        results, replies = await self._evaluator.students(self._engines, sets, step, stage)
        if teachers:
            external = self._prepared.config.teacher_in_use.weights == "external"
            results += await self._evaluator.teachers(self._teachers, sets, step, stage, external)
        # Replies before results: if the run is killed in between, the evaluation has no results and is repeated.
        for reply in replies if self._prepared.config.evaluation.record else first_of_each_set(replies):
            self._log.reply(reply)
        self._log.evaluation(*results)
        self._evaluated |= {s.settings.name: step for s in sets}
        self._progress.evaluation(results)
        await self._judge(step, results, replies)
        self._progress.phase("training")

    async def _judge(self, step: int, results: list[EvalResult], replies: list[Reply]) -> None:
        """Apply the retention guard. On a breach: warn, or save and raise RetentionLost to stop or roll back."""
        breaches, retention = self._guard.judge(results), self._prepared.config.retention
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
        await self._saving.save(step, self._guard.held)
        await self._saving.saved()
        if retention.action == "stop":
            raise RetentionLost(f"{text}; stopped at a checkpoint of this step; the same command continues from it")
        self._roll_back(text)

    def _roll_back(self, text: str) -> None:
        """Set aside the checkpoints after the last step that held, and raise RetentionLost."""
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
