"""The evaluations of a run: replies and results are logged, and the retention guard acts on them.

engines -> evaluator: results, replies -> samples.jsonl, eval.jsonl -> guard.py: warn, stop or roll back
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sdft.services.data.sets import LoadedSet
from sdft.services.evaluation.evaluator import Evaluator
from sdft.services.fleet.pool import EnginePool
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.prepared import Prepared
from sdft.services.records.rows import EvalResult, first_of_each_set, read_rows
from sdft.services.training.guard import Guard


class Evaluations:
    """Evaluates sets between two steps, on the pool `engines`, which holds the student's weights of the step.

    The first evaluation is also one of the teachers, on their pools by their routes.
    """

    def __init__(
        self,
        prepared: Prepared,
        run_dir: Path,
        engines: EnginePool,
        teachers: Mapping[str, EnginePool],
        guard: Guard,
        log: RunLog,
        progress: Progress,
    ) -> None:
        self._prepared = prepared
        self._engines, self._teachers, self._guard = engines, teachers, guard
        self._log, self._progress = log, progress
        self._evaluator = Evaluator(prepared.tokenizer, prepared.config.evaluation.grading_timeout_s, progress.part)
        earlier = read_rows(run_dir, EvalResult)
        self._evaluated: dict[str, int] = {result.task: result.step for result in earlier}  # set -> its last step
        self._new = [loaded for loaded in prepared.sets if loaded.settings.name not in self._evaluated]

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
            note = self._progress.note
            results += await self._evaluator.teachers(self._teachers, sets, step, stage, external, note)
        # Replies before results: if the run is killed in between, the evaluation has no results and is repeated.
        for reply in replies if self._prepared.config.evaluation.record else first_of_each_set(replies):
            self._log.reply(reply)
        self._log.evaluation(*results)
        self._evaluated |= {s.settings.name: step for s in sets}
        self._progress.evaluation(results)
        await self._guard.evaluated(step, results, replies)
        self._progress.phase("training")
