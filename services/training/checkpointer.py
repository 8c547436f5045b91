"""Writing of checkpoints: begun between two steps, flushed to disk during the next steps.

the learner's state, a copy of the ledger ─► a hidden folder ─► checkpoints.commit: complete, flushed, renamed
"""

import asyncio
import sqlite3
from pathlib import Path

from sdft.actors.shared.reason import reason
from sdft.actors.shared.waiting import cancelled, within
from sdft.learner.group import LearnerGroup
from sdft.services.base.errors import PreflightError
from sdft.services.base.files import of_a_file
from sdft.services.monitoring.console import Progress
from sdft.services.planning.prepared import Prepared
from sdft.services.records import checkpoints
from sdft.services.records.checkpoints import CheckpointState
from sdft.services.records.ledger import Ledger

FILE_ERRORS = (OSError, sqlite3.OperationalError)  # further filtered by of_a_file


class Checkpointer:
    """Writes the checkpoints of a run, one after the other."""

    def __init__(
        self, prepared: Prepared, run_dir: Path, learner: LearnerGroup, ledger: Ledger, progress: Progress
    ) -> None:
        self._prepared, self._run_dir = prepared, run_dir
        self._learner, self._ledger, self._progress = learner, ledger, progress
        self._saving: asyncio.Task[None] | None = None
        self._committing: asyncio.Future[tuple[Path, list[str]]] | None = None  # in a thread

    async def save(self, step: int, held: int | None) -> None:
        """Write the state after `step`. Flush and rename follow in the background, during the next step.

        held: the newest checkpoint up to this step is kept, however many follow.
        """
        self._progress.phase(f"saving step {step}")
        try:
            part = checkpoints.begin(self._run_dir, step)
            await self._learner.save(part)
            self._ledger.copy_to(part / checkpoints.LEDGER)
        except FILE_ERRORS as error:
            await self._not_written(step, error)
            return
        finally:
            self._progress.phase("training")
        c = self._prepared.config
        fingerprint = self._prepared.at(step).fingerprint
        begun = self._prepared.begun.isoformat()
        state = CheckpointState(step, c.learner.ranks, c.learner.zero_stage_for(c.dtype), c.dtype, fingerprint, begun)
        self._saving = asyncio.create_task(
            self._commit(part, state, held), name=f"the checkpoint of step {step} to be on the disk"
        )

    async def saved(self) -> None:
        """Wait until the checkpoint that was begun is on the disk. TimeoutError after checkpoint.timeout_s."""
        if self._saving is not None:
            limit = self._prepared.config.checkpoint.timeout_s
            await within(self._saving, limit, self._saving.get_name())
            self._saving = None

    async def stop(self) -> None:
        """Cancel the background write and wait for a commit that runs in a thread.

        A thread cannot be cancelled. It must not rename a checkpoint after another one was chosen to resume from.
        """
        await cancelled([] if self._saving is None else [self._saving])
        if self._committing is not None:
            try:
                limit = self._prepared.config.checkpoint.timeout_s
                await within(self._committing, limit, "the newest checkpoint to be on the disk")
            except FILE_ERRORS as error:
                if not of_a_file(error):
                    raise

    async def _commit(self, part: Path, state: CheckpointState, held: int | None) -> None:
        keep = self._prepared.config.checkpoint.keep
        try:
            await self._learner.written()
            commit = asyncio.to_thread(checkpoints.commit, part, self._run_dir, state, keep, held)
            self._committing = asyncio.ensure_future(commit)
            _, notes = await asyncio.shield(self._committing)
        except FILE_ERRORS as error:
            await self._not_written(state.step, error)
            return
        for note in notes:
            self._progress.note(note)

    async def _not_written(self, step: int, error: OSError | sqlite3.OperationalError) -> None:
        """Report a checkpoint that could not be written; PreflightError if it is the run's last.

        A full disk ends a run only at the last checkpoint, because room may be made until then. The incomplete folder
        is removed, so that metrics and the ledger have room. Other errors than those of a file are raised, such as a
        learner that does not answer in time.
        """
        if not of_a_file(error):
            raise error
        await asyncio.to_thread(checkpoints.remove_parts, self._run_dir)
        text = f"the checkpoint of step {step} could not be written ({reason(error)})"
        if step == self._prepared.schedule.total_steps:
            raise PreflightError(
                f"{text}; make room, and run the same command again: it resumes from the last checkpoint"
            ) from error
        self._progress.note(f"{text}; the run continues, and a resume would use the checkpoint before it")
