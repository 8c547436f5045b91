"""The retention guard: what it finds is an event, and it warns, stops the run or rolls it back.

    an evaluation ─► guarded sets that fell (retention.py) ─┐
    a step        ─► figures that drifted (detectors.py)   ─┴─► events.jsonl, retention.action

Its state is a function of metrics.jsonl and eval.jsonl, so a resumed run goes on with the same one.
"""

from collections.abc import Iterable
from pathlib import Path

from sdft.services.base.errors import RetentionLost, UserError
from sdft.services.evaluation.replies import write_replies
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.prepared import Prepared
from sdft.services.records import checkpoints
from sdft.services.records.rows import EvalResult, Event, Reply, StepMetrics, read_rows
from sdft.services.training.checkpointer import Checkpointer
from sdft.services.training.detectors import Detectors
from sdft.services.training.retention import Breach, RetentionGuard


class Guard:
    """The retention guard of a run. Without the section `retention` it finds nothing."""

    def __init__(
        self, prepared: Prepared, run_dir: Path, saving: Checkpointer, log: RunLog, progress: Progress
    ) -> None:
        self._retention, self._run_dir = prepared.config.retention, run_dir
        self._saving, self._log, self._progress = saving, log, progress
        detectors = None if self._retention is None else self._retention.detectors
        self._sets = RetentionGuard(prepared.config, read_rows(run_dir, EvalResult))
        self._detectors = Detectors(detectors, read_rows(run_dir, StepMetrics) if detectors is not None else ())
        self._guards_sets = bool(prepared.config.guarded)

    @property
    def held(self) -> int | None:
        """The last step at which all that is guarded held; None if there is none."""
        held = [self._sets.held] if self._guards_sets else []
        if self._retention is not None and self._retention.detectors is not None:
            held.append(self._detectors.held)
        known = [step for step in held if step is not None]
        return min(known) if held and len(known) == len(held) else None

    def broken_since(self, step: int) -> list[str]:
        """Return what has not held at some step after `step`, as sentences."""
        fallen = [str(breach) for breach in self._sets.last.values() if breach.now.step > step]
        return fallen + [str(drift) for drift in self._detectors.last.values() if drift.step > step]

    async def evaluated(self, step: int, results: list[EvalResult], replies: list[Reply]) -> None:
        """Judge the results of an evaluation. Raises RetentionLost if the action ends the run."""
        breaches = self._sets.judge(results)
        if breaches:
            where = self._kept(step, breaches, replies)
            text = "; ".join(map(str, breaches))
            await self._act(Event(step, breaches[0].now.stage, "fell", text), f"; the replies {where}")

    async def stepped(self, metrics: StepMetrics) -> None:
        """Judge a step's figures, after its evaluation. Raises RetentionLost if the action ends the run."""
        drifts = self._detectors.judge(metrics)
        if drifts:
            await self._act(Event(metrics.step, metrics.stage, "drifted", "; ".join(map(str, drifts))))

    def _kept(self, step: int, breaches: Iterable[Breach], replies: Iterable[Reply]) -> str:
        """Write the replies to the sets that fell. Returns where they are."""
        fallen = {breach.now.task for breach in breaches}
        path = self._run_dir / f"retention-step-{step:06d}.jsonl"
        try:
            write_replies(path, [b.now for b in breaches], [r for r in replies if r.task in fallen])
        except OSError as error:  # the guard's action does not depend on this file
            return f"could not be written ({error})"
        return f"are in {path.name}"

    async def _act(self, event: Event, more: str = "") -> None:
        """Warn, or save a checkpoint and raise RetentionLost to stop or roll back."""
        assert self._retention is not None
        text = f"retention guard: {event.text}{more}"
        self._log.event(event)
        self._progress.note(text)
        if self._retention.action == "warn":
            return
        await self._saving.save(event.step, self.held)
        await self._saving.saved()
        if self._retention.action == "stop":
            raise RetentionLost(f"{text}; stopped at a checkpoint of this step; the same command continues from it")
        self._roll_back(text)

    def _roll_back(self, text: str) -> None:
        """Set aside the checkpoints after the last step that held, and raise RetentionLost."""
        held = self.held or 0
        try:
            checkpoints.set_aside(self._run_dir, held)
        except UserError as error:
            raise RetentionLost(f"{text}; it held at step {held}, and the run is not rolled back: {error}") from error
        good, _ = checkpoints.newest(self._run_dir)
        where = "the base model, because no checkpoint had been saved" if good is None else good.name
        raise RetentionLost(
            f"{text}; rolled back to {where}; what is guarded last held at step {held}, and later checkpoints are set "
            f"aside as checkpoints/aside-*; to train with other settings, start a new run from the model that "
            f"`sdft export {self._run_dir}` writes"
        )
