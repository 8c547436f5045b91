"""The guard on a run whose completions become long: a note, a stop, a rollback, and a continued run. In simulated time.

test_retention has what it does about guarded sets.
"""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import RetentionLost, UserError
from sdft.services.config.evaluation import RetentionConfig
from sdft.services.config.run import RunConfig
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.guard import check_guard
from sdft.services.planning.prepared import Prepared
from sdft.services.records.checkpoints import LEDGER, folder_of, folders
from sdft.services.records.ledger import restore_ledger
from sdft.services.records.rows import Event, StepMetrics, read_rows
from simulation.cluster import ANSWER, LOGPROBS, Case, Learner, Student, drive, prepared
from tests.services.training.test_later_sets import Staged

LONG_FROM = 6  # from this weight version on, the simulated student's completions are ten times as long
STEPS, WINDOW = 12, 2
CASE = Case("guard", engines=1, staleness=0, steps=STEPS)
LEAST = {"model": "m", "data": {"train": "a.jsonl"}, "training": {"steps": STEPS}}


class Rambling(Student):
    """Completions of 10 tokens, later of 100 that are cut there."""

    def generate(self, items: Any, argument: Any) -> tuple[float, Any]:
        seconds, made = super().generate(items, argument)
        n, reason = (10, "stop") if self.version < LONG_FROM else (100, "length")
        return seconds, [
            replace(
                rollout,
                completion_ids=ANSWER[:n],
                logprobs=LOGPROBS[:n],
                versions=((self.version, 0, n),),
                finish_reason=reason,
            )
            for rollout in made
        ]


def run_of(action: str) -> Prepared:
    one = prepared(CASE, 8)
    retention = RetentionConfig.model_validate({"detectors": {"window": WINDOW}, "action": action})
    checkpoint = one.config.checkpoint.model_copy(update={"every": 1, "keep": 1})
    return replace(one, config=one.config.model_copy(update={"retention": retention, "checkpoint": checkpoint}))


def trained(run_dir: Path, action: str, first_step: int = 0) -> str:
    """Train from `first_step`, beginning as session.py does. Returns the output."""
    RunLog.rewind(run_dir, first_step or None)
    if first_step:
        restore_ledger(folder_of(run_dir, first_step) / LEDGER, run_dir / "ledger.sqlite")
    said = io.StringIO()
    learner = Staged(first_step) if first_step else Learner(0.1)
    drive(run_of(action), run_dir, CASE, lambda number: Rambling(number, CASE), learner, said, first_step=first_step)
    return said.getvalue()


def test_the_figures_of_completions_are_in_the_metrics(tmp_path: Path) -> None:
    trained(tmp_path, "warn")
    rows = read_rows(tmp_path, StepMetrics)
    assert [(row.length_mean, row.length_tail, row.truncated) for row in rows[LONG_FROM - 1 : LONG_FROM + 1]] == [
        (10.0, 10.0, 0.0),
        (100.0, 100.0, 1.0),
    ]
    assert {(row.empty, row.entropy) for row in rows} == {(0.0, None)}  # the simulated learner counts no tokens
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert (next(iter(line)), line["entropy"]) == ("step", None)


def test_a_warning_is_an_event_and_the_run_goes_on(tmp_path: Path) -> None:
    said = trained(tmp_path, "warn")
    (event,) = read_rows(tmp_path, Event)
    assert (event.step, event.kind) == (LONG_FROM + 1, "drifted")
    assert event.text.startswith(
        "the mean length of completions rose from 10 to 55 at step 7: a factor of 2 is allowed; the 95th percentile of "
        "lengths rose from 10 to 55 at step 7: a factor of 2 is allowed; the share of truncated completions rose from "
        "0.0 % to 50.0 % at step 7: 20 points are allowed"
    )
    assert f"retention guard: {event.text}" in said
    assert read_rows(tmp_path, StepMetrics)[-1].step == STEPS


def test_a_run_that_was_stopped_continues_in_spite_of_it(tmp_path: Path) -> None:
    with pytest.raises(RetentionLost, match="stopped at a checkpoint of this step; the same command continues"):
        trained(tmp_path, "stop")
    assert list(folders(tmp_path)) == [LONG_FROM, LONG_FROM + 1]  # the last one that held, and that of the stop
    trained(tmp_path, "stop", first_step=LONG_FROM + 1)
    assert read_rows(tmp_path, StepMetrics)[-1].step == STEPS
    assert len(read_rows(tmp_path, Event)) == 1


def test_a_rollback_ends_at_the_last_checkpoint_that_held(tmp_path: Path) -> None:
    with pytest.raises(RetentionLost, match=r"rolled back to step-000006; what is guarded last held at step 6"):
        trained(tmp_path, "rollback")
    assert list(folders(tmp_path)) == [LONG_FROM]
    (aside,) = (tmp_path / "checkpoints").glob("aside-*")
    shutil.rmtree(aside)  # the next one may have the same name, of this second
    with pytest.raises(RetentionLost, match=r"rolled back to step-000006"):
        trained(tmp_path, "rollback", first_step=LONG_FROM)
    assert [event.step for event in read_rows(tmp_path, Event)] == [LONG_FROM + 1]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, "nothing is guarded; set max_drop, for evaluation sets, or detectors"),
        ({"detectors": {}, "sets": ["x"]}, "sets have no effect without max_drop"),
        ({"detectors": {"length": 0.5}}, "greater than 1"),
    ],
)
def test_a_guard_that_guards_nothing_is_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate(LEAST | {"retention": section})


def test_a_stop_at_any_step_needs_a_teacher_that_is_sent_at_every_step() -> None:
    settings = LEAST | {"weights": {"teacher_sync_every": 2}, "checkpoint": {"every": 2}}
    for action in ("warn", "rollback"):
        RunConfig.model_validate(settings | {"retention": {"detectors": {}, "action": action}})
    with pytest.raises(ValueError, match=r"weights.teacher_sync_every 2 must be 1"):
        RunConfig.model_validate(settings | {"retention": {"detectors": {}, "action": "stop"}})


def test_detectors_that_would_never_compare_are_refused() -> None:
    one = run_of("warn")
    schedules = [stage.schedule for stage in one.stages]
    for window, fits in ((STEPS // 2, True), (STEPS // 2 + 1, False)):
        retention = RetentionConfig.model_validate({"detectors": {"window": window}})
        config = one.config.model_copy(update={"retention": retention})
        if fits:
            check_guard(config, schedules)
            continue
        with pytest.raises(UserError, match="window 7 needs a stage of 14 steps, and the longest has 12; lower"):
            check_guard(config, schedules)
