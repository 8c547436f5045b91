"""Compare the records that a run has trained with those that its sources have now.

Records behind the trained prefix are new, and a resumed run trains them. Another prefix is another run.
"""

from collections.abc import Sequence
from pathlib import Path

from sdft.services.base.errors import UserError
from sdft.services.data.schedule import StageSchedule
from sdft.services.records.ledger import Drawn, read_drawn

NEW_RUN = "or name another --run-dir to begin a new run"


def check_prefixes(schedules: Sequence[StageSchedule], ledger: Path) -> None:
    """UserError if a source that grows has not the records that the samples in a checkpoint's ledger belong to."""
    for schedule in schedules:
        if schedule.source.grows:
            _check(schedule, read_drawn(ledger, schedule.stage))


def _check(schedule: StageSchedule, trained: Sequence[Drawn]) -> None:
    source = schedule.source
    for record in trained:
        if record.index >= source.known:
            raise UserError(
                f"{source.name}: it has {source.known} records, and the run has trained {len(trained)}, the last one "
                f"from {trained[-1].where}; restore the rows, {NEW_RUN}"
            )
        if source.digest(record.index) != record.digest:
            raise UserError(
                f"{source.records[record.index].where}: the run has trained another record in this place "
                f"({record.where}); restore the row as it was, with the same data.template, data.system and tokenizer, "
                f"{NEW_RUN}"
            )
    if len(trained) % schedule.batch_size and source.known > len(trained) != schedule.limit:
        raise UserError(
            f"{source.records[len(trained)].where}: the run has trained the record before it in a last, short batch, "
            f'because the source was closed there; put the row {{"closed": true}} back before this one, {NEW_RUN}'
        )
