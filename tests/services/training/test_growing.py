"""The controller on a source that grows, with simulated engines and in simulated time."""

import asyncio
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdft.services.config.data import DataConfig
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.data.demonstrations import Record
from sdft.services.data.pairs import PromptPair
from sdft.services.data.schedule import StageSchedule
from sdft.services.data.sources.growing import GrowingSource
from sdft.services.data.sources.open import open_source
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.prefix import check_prefixes
from sdft.services.planning.prepared import Prepared
from sdft.services.records.checkpoints import LEDGER, folder_of, folders
from sdft.services.records.ledger import restore_ledger
from sdft.services.records.rows import read_jsonl
from simulation.cluster import Case, drive, prepared
from tests.services.training.test_later_sets import Staged, loaded
from tests.services.training.test_retention import Forgetful, Tokens

BATCH, EVERY_S = 4, 100.0
SET = EvaluationSet(name="q", file="q.jsonl", grader="exact", max_new_tokens=4)


class Arriving(GrowingSource):
    """One row every EVERY_S of the loop's time. data.train has the number of rows that are there from the start, the
    number of all rows, and whether a closing row follows them."""

    def rows(self, after: int) -> Iterator[tuple[int, dict[str, Any]]]:
        there, last, closes = self.name.split(",")
        try:
            time = asyncio.get_running_loop().time()
        except RuntimeError:
            time = 0.0
        come = int(there) + int(time // EVERY_S)
        for number in range(after + 1, min(come, int(last)) + 1):
            yield number, {"prompt": f"{number}"} if number != 3 else {"prompt": ""}
        if come > int(last) and closes == "closes":
            yield int(last) + 1, {"closed": True}


def build(records: Sequence[Record]) -> list[PromptPair]:
    return [PromptPair.of([int(record.messages[0]["content"])], [1]) for record in records]


def run_of(name: str, staleness: int = 0, **training: Any) -> Prepared:
    one = prepared(Case("growing", engines=1, staleness=staleness), BATCH)
    (stage,) = one.stages
    data = DataConfig(train=name, source=f"{__name__}:Arriving", record_timeout_s=20 * EVERY_S)
    source = open_source(data, Path(), ("prompt",), build)
    schedule = StageSchedule(source, BATCH, 1, 0, training.get("limit"))
    task = stage.config.model_copy(update={"data": data})
    stage = replace(stage, config=task, source=source, schedule=schedule)
    checkpoint = one.config.checkpoint.model_copy(update={"every": 2})
    config = one.config.model_copy(update={"checkpoint": checkpoint})
    return replace(one, config=config, stages=(stage,), common=[loaded(SET)], tokenizer=Tokens())


def train(run_dir: Path, one: Prepared, first_step: int = 0) -> str:
    """Train to the end as session.py does, and return the output."""
    case, said = Case("growing", engines=1, staleness=one.config.training.max_staleness), io.StringIO()
    RunLog.rewind(run_dir, first_step or None)
    restore_ledger(folder_of(run_dir, first_step) / LEDGER if first_step else None, run_dir / "ledger.sqlite")
    if first_step:
        check_prefixes(one.schedule.stages, run_dir / "ledger.sqlite")
    try:
        drive(one, run_dir, case, lambda n: Forgetful(n, case), Staged(first_step), said, first_step=first_step)
    finally:
        (run_dir / "log").write_text(said.getvalue())
    return said.getvalue()


def steps(run_dir: Path) -> list[tuple[int, int, int]]:
    return [(row["step"], row["samples"], row["trained"]) for row in read_jsonl(run_dir / "metrics.jsonl")]


def evaluated(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(run_dir / "eval.jsonl") if row["metric"] == "accuracy"]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_waits_for_records_and_ends_with_the_source(tmp_path: Path, staleness: int) -> None:
    said = train(tmp_path, run_of("5,11,closes", staleness))
    assert steps(tmp_path) == [(1, 4, 4), (2, 4, 8), (3, 2, 10)]
    assert evaluated(tmp_path) == [0, 3]
    assert list(folders(tmp_path)) == [2, 3]
    assert "waiting for record 8 of 5,11,closes (4 known)" in said
    assert json.loads((tmp_path / "skipped.jsonl").read_text()) == {"problem": "5,11,closes:3: prompt is empty"}


def test_a_source_that_is_closed_behind_the_last_batch_ends_the_run_with_that_step(tmp_path: Path) -> None:
    """The run learns only after the step that it was the last one."""
    train(tmp_path, run_of("5,9,closes"))
    assert steps(tmp_path) == [(1, 4, 4), (2, 4, 8)]
    assert evaluated(tmp_path) == [0, 2]
    assert list(folders(tmp_path)) == [2]


def test_a_wait_without_an_end_fails_with_the_reason(tmp_path: Path) -> None:
    expected = r"waited 2000 s for record 8 of 5,7,open \(4 known\); 2 arrived meanwhile; rows skipped: 1, the last"
    with pytest.raises(TimeoutError, match=expected):
        train(tmp_path, run_of("5,7,open"))
    assert steps(tmp_path) == [(1, 4, 4)]


def test_steps_end_a_run_before_its_source(tmp_path: Path) -> None:
    train(tmp_path, run_of("5,100,open", limit=2 * BATCH))
    assert steps(tmp_path) == [(1, 4, 4), (2, 4, 8)]
    assert evaluated(tmp_path) == [0, 2]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resumed_run_trains_what_came_since(tmp_path: Path, staleness: int) -> None:
    with pytest.raises(TimeoutError):
        train(tmp_path, run_of("9,10,open", staleness))
    assert list(folders(tmp_path)) == [2]
    train(tmp_path, run_of("12,15,closes", staleness), first_step=2)
    assert steps(tmp_path) == [(1, 4, 4), (2, 4, 8), (3, 4, 12), (4, 2, 14)]
    assert evaluated(tmp_path) == [0, 4]


def test_a_source_that_was_closed_while_the_run_was_stopped_ends_it_with_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        train(tmp_path, run_of("9,9,open"))
    assert evaluated(tmp_path) == [0]
    train(tmp_path, run_of("20,9,closes"), first_step=2)
    assert steps(tmp_path) == [(1, 4, 4), (2, 4, 8)]
    assert evaluated(tmp_path) == [0, 2]
