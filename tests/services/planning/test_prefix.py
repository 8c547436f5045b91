"""What a resumed run compares with a source that grows: the records that it has trained."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdft.actors.shared.types import SampleId
from sdft.services.base.errors import UserError
from sdft.services.config.append import as_stream
from sdft.services.config.load import load_config
from sdft.services.data.schedule import StageSchedule
from sdft.services.planning.prefix import check_prefixes
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import learner_settings
from sdft.services.records.ledger import Ledger, read_drawn
from tests.runs.run import write_run
from tests.services.data.test_sources import CLOSE, append, opened, row


def schedule_of(log: Path, limit: int | None = None) -> StageSchedule:
    return StageSchedule(opened(log), batch_size=2, generations=1, seed=0, limit=limit)


def write(log: Path, *rows: Any) -> None:
    log.write_bytes(b"")
    append(log, *rows)


def trained(log: Path, steps: int, in_flight: int = 0) -> Path:
    """Return the ledger of a run that has trained so many steps, and has begun so many more."""
    ledger, schedule = Ledger(log.with_name("ledger.sqlite")), schedule_of(log)
    for step in range(1, steps + in_flight + 1):
        samples = schedule.batch(step)
        ledger.issue(samples, step, schedule.drawn(step))
        for state in ("sampled", "scored", "trained") if step <= steps else ():
            ledger.advance(samples, state)
    ledger.close()
    return log.with_name("ledger.sqlite")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    write(path, *(row(i) for i in range(6)))
    return path


def test_records_behind_the_trained_prefix_may_be_new_or_other_ones(log: Path) -> None:
    ledger = trained(log, steps=2, in_flight=1)
    assert [record.index for record in read_drawn(ledger, 0)] == [0, 1, 2, 3]
    for behind in ((), (row(4), row(5), row(6)), (row(9), b"{\n"), (CLOSE,)):
        write(log, *(row(i) for i in range(4)), *behind)
        check_prefixes([schedule_of(log)], ledger)


def test_the_first_line_that_is_not_as_it_was_trained_is_named(log: Path) -> None:
    ledger = trained(log, steps=2)
    for rows in ((row(0), row(1), row(9), row(3)), (row(0), row(1), b"{\n", row(3), row(4))):
        write(log, *rows)
        line = 3 if isinstance(rows[2], dict) else 4
        with pytest.raises(UserError, match=rf"log\.jsonl:{line}: the run has trained another record .*:3\); rest"):
            check_prefixes([schedule_of(log)], ledger)
    write(log, row(0))
    with pytest.raises(UserError, match=r"it has 1 records, and the run has trained 4, the last one from .*:4"):
        check_prefixes([schedule_of(log)], ledger)


def test_a_log_that_was_closed_within_a_batch_stays_closed(log: Path) -> None:
    write(log, row(0), row(1), row(2), CLOSE)
    ledger = trained(log, steps=2)
    check_prefixes([schedule_of(log)], ledger)
    write(log, row(0), row(1), row(2), row(3))
    with pytest.raises(UserError, match=r'log\.jsonl:4: .* short batch, .* put the row {"closed": true} back before'):
        check_prefixes([schedule_of(log)], ledger)


def test_a_ledger_of_an_earlier_version_has_no_records(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.issue([SampleId(0, 0, 0, 0)], step=1)
    ledger._db.execute("DROP TABLE records")
    ledger.close()
    assert read_drawn(tmp_path / "ledger.sqlite", 0) == []


def test_a_restart_forgets_the_records_that_were_only_in_flight(log: Path) -> None:
    path = trained(log, steps=1, in_flight=2)
    ledger = Ledger(path)
    assert ledger.forget_in_flight() == 4
    schedule = schedule_of(log)
    ledger.issue(schedule.batch(2), 2, schedule.drawn(2))
    ledger.close()
    assert len(read_drawn(path, 0)) == 2


def grown(folder: Path, model: Path, *overrides: str, rows: int = 3) -> Any:
    """Prepare the small run on a log of so many rows."""
    path = write_run(folder, model, "float32")
    (folder / "log.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(rows)))
    given = ["data.train=log.jsonl", "data.source=log", "training.steps=null", "learner.optimizer.schedule=constant"]
    return prepare(load_config(path, [*given, *overrides]), path)


def test_the_fingerprint_of_a_log_is_of_settings_and_model(tiny_model: Path, tmp_path: Path) -> None:
    first = grown(tmp_path, tiny_model).stages[0].fingerprint
    assert grown(tmp_path, tiny_model, rows=9).stages[0].fingerprint == first
    assert grown(tmp_path, tiny_model, "training.steps=50").stages[0].fingerprint == first
    cosine = "learner.optimizer.schedule=cosine"
    of_cosine = [
        grown(tmp_path, tiny_model, f"training.steps={steps}", cosine).stages[0].fingerprint for steps in (50, 60)
    ]
    others = [grown(tmp_path, tiny_model, given).stages[0].fingerprint for given in ("seed=5", "training.steps=2")]
    assert len({first, *of_cosine, *others}) == 5


def test_the_learning_rate_goes_over_the_steps_that_are_set_wherever_the_log_ends(
    tiny_model: Path, tmp_path: Path
) -> None:
    for rows in (0, 3, 40):
        assert learner_settings(grown(tmp_path, tiny_model, rows=rows)).stages[0].steps is None
        assert learner_settings(grown(tmp_path, tiny_model, "training.steps=5", rows=rows)).stages[0].steps == 5


def test_a_run_is_prepared_from_a_log_without_a_record(tiny_model: Path, tmp_path: Path) -> None:
    empty, full = grown(tmp_path, tiny_model, rows=0), grown(tmp_path, tiny_model, rows=3)
    assert empty.stop_ids == full.stop_ids
    assert len(empty.probe_ids) > 10
    assert empty.schedule.total_steps is None
    assert empty.stages[0].source.known == 0


def test_a_stage_behind_a_log_waits_for_its_end(tiny_model: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path, tiny_model, "float32")
    log = {"train": "log.jsonl", "source": "log"}
    stages = [
        {"name": "a", "data": log, "optimizer": {"schedule": "constant"}},
        {"name": "b", "data": {"train": "train.jsonl"}, "steps": 2},
    ]
    settings = load_config(path).model_dump(mode="json") | {"data": None, "stages": stages}
    settings["training"]["steps"] = None
    path.write_text(json.dumps(settings))
    write(tmp_path / "log.jsonl", *(row(i) for i in range(6)))
    with pytest.raises(UserError, match=r"stage a is not the last one, .* close the source with"):
        prepare(load_config(path), path)
    append(tmp_path / "log.jsonl", CLOSE)
    schedule = prepare(load_config(path), path).schedule
    assert [(stage.before, stage.last) for stage in schedule.stages] == [(0, 2), (2, 4)]


def test_a_log_that_becomes_a_stage_keeps_its_fingerprint(tiny_model: Path, tmp_path: Path) -> None:
    alone = grown(tmp_path, tiny_model)
    stream = prepare(as_stream(alone.config, "log"), alone.path)
    assert [stage.fingerprint for stage in stream.stages] == [alone.stages[0].fingerprint]
