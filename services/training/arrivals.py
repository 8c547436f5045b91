"""The wait for records: a step begins once the source of its stage has all records of the batch.

    source is closed, or has the batch ─► train          too few records ─► wait, at most data.record_timeout_s

Rows that the source skips are printed and written to skipped.jsonl. A fixed source has all records from the start.
"""

from contextlib import suppress
from pathlib import Path

from sdft.services.monitoring.console import Progress
from sdft.services.planning.prepared import Prepared
from sdft.services.records.skipped import write_skipped


class Arrivals:
    """Waits for the records of each step."""

    def __init__(self, prepared: Prepared, run_dir: Path, progress: Progress) -> None:
        self._prepared, self._run_dir, self._progress = prepared, run_dir, progress
        self._sources = [stage.source for stage in prepared.stages]
        self._reported = [len(source.skipped) for source in self._sources]  # by the warnings of the stages
        if any(source.grows for source in self._sources):
            self._write()  # also if it is empty: an earlier start may have skipped rows that are corrected now

    async def wait(self, step: int) -> bool:
        """Wait until the batch of a step is ready. False: the run has no such step. TimeoutError names the source."""
        schedule = self._prepared.schedule
        if not schedule.has(step):
            return False
        stage = schedule.at(step)
        source, needed = stage.source, stage.needed(step)
        if not stage.is_ready(step) and not source.closed:
            self._progress.phase(f"waiting for record {needed} of {source.name} ({source.known} known)")
            await source.wait(needed, self._prepared.at(step).config.data.record_timeout_s)
            self._progress.phase("training")
        self._report()
        return self._prepared.schedule.has(step)

    def _report(self) -> None:
        now = [len(source.skipped) for source in self._sources]
        if now == self._reported:
            return
        for source, reported in zip(self._sources, self._reported, strict=True):
            for problem in source.skipped[reported:]:
                self._progress.note(f"skipped: {problem}")
        self._reported = now
        self._write()

    def _write(self) -> None:
        with suppress(OSError):  # as on a full disk: the next skipped row tries again
            write_skipped(self._run_dir, [problem for source in self._sources for problem in source.skipped])
