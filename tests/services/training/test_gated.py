"""A gated teacher: which refreshes are due, made and refused, also in a run that is resumed. In simulated time."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdft.actors.roles import TEACHER
from sdft.actors.shared.types import Snapshot
from sdft.learner.config import TeacherConfig
from sdft.services.base.errors import UserError
from sdft.services.config.evaluation import EvaluationConfig, RetentionConfig
from sdft.services.config.run import RunConfig
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.fingerprint import fingerprint_of
from sdft.services.planning.guard import check_guard
from sdft.services.planning.prepared import Prepared
from sdft.services.records.checkpoints import LEDGER, folder_of
from sdft.services.records.ledger import restore_ledger
from sdft.services.records.rows import EvalResult, Event, read_rows
from simulation.cluster import ANSWER, LOGPROBS, Case, Student, drive, prepared
from tests.services.training.test_later_sets import Staged, loaded
from tests.services.training.test_retention import Tokens

STEPS, EVERY, WINDOW = 21, 4, 2
LONG = range(9, 11)  # weight versions whose completions are ten times as long
SET = {"name": "old", "file": "q.jsonl", "grader": "exact", "role": "retention", "max_new_tokens": 4}
CASE = Case("gated", engines=1, staleness=0, steps=STEPS)
LEAST = {"model": "m", "data": {"train": "a.jsonl"}, "training": {"steps": STEPS}}
GATED = {"weights": "gated", "refresh_every": EVERY}
DETECTORS = {"detectors": {"window": WINDOW}}


class Sometimes(Student):
    """Completions of 10 tokens, of 100 with the weights in LONG; replies to questions are right (test_retention)."""

    def generate(self, items: Any, argument: Any) -> tuple[float, Any]:
        seconds, made = super().generate(items, argument)
        n = 100 if self.version in LONG else 10
        return seconds, [
            replace(r, completion_ids=ANSWER[:n], logprobs=LOGPROBS[:n], versions=((self.version, 0, n),)) for r in made
        ]


class Refreshing(Staged):
    """A learner that notes refreshes, and the versions of the teacher that it publishes."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.done: list[tuple[str, int]] = []

    async def refresh_teacher(self) -> None:
        self.done.append(("refreshed", self._step))

    async def publish(self, role: str, version: int) -> Snapshot:
        if role == TEACHER:
            self.done.append(("published", version))
        return await super().publish(role, version)


def run_of(**retention: Any) -> Prepared:
    one = prepared(CASE, 8)
    changes = {
        "teacher": TeacherConfig.model_validate(GATED),
        "retention": RetentionConfig.model_validate(DETECTORS | retention),
        "checkpoint": one.config.checkpoint.model_copy(update={"every": 1, "keep": 100}),
    }
    config = one.config.model_copy(update=changes)
    (stage,) = one.stages
    task = stage.config.model_copy(update=changes)
    return replace(one, config=config, stages=(replace(stage, config=task),))


def trained(run_dir: Path, one: Prepared, first_step: int = 0) -> tuple[list[tuple[str, int]], str]:
    """Train from `first_step`, beginning as session.py does. Returns what the learner did, and the output."""
    RunLog.rewind(run_dir, first_step or None)
    if first_step:
        restore_ledger(folder_of(run_dir, first_step) / LEDGER, run_dir / "ledger.sqlite")
    learner, said = Refreshing(first_step), io.StringIO()
    drive(one, run_dir, CASE, lambda number: Sometimes(number, CASE), learner, said, first_step=first_step)
    return learner.done, said.getvalue()


def test_a_teacher_is_refreshed_unless_something_drifted_since_the_last_time(tmp_path: Path) -> None:
    """Versions 9 and 10 make the batches of steps 10 and 11, so windows have drifted at steps 10 to 12.

    The refresh of step 12 is refused. By step 16 nothing has drifted any more. Step 20 is before the last one.
    """
    done, said = trained(tmp_path, run_of())
    events = [(e.step, e.kind) for e in read_rows(tmp_path, Event)]
    assert events == [
        (4, "refreshed"),
        (8, "refreshed"),
        (10, "drifted"),
        (12, "refused"),
        (16, "refreshed"),
        (20, "refreshed"),
    ]
    assert done == [
        ("published", 0),
        *[(what, step) for step in (4, 8, 16, 20) for what in ("refreshed", "published")],
    ]
    assert "the teacher is the student of step 8" in said
    (refused,) = [e.text for e in read_rows(tmp_path, Event) if e.kind == "refused"]
    assert "the mean length of completions rose from 10 to 55 at step 12" in refused
    assert f"the teacher is not refreshed after step 12: {refused}" in said


@pytest.mark.parametrize("stopped", [3, 4, 9, 11, 12, 14, 16])
def test_a_resumed_run_refreshes_and_refuses_as_one_that_was_not_interrupted(stopped: int, tmp_path: Path) -> None:
    whole, _ = trained(tmp_path, run_of())
    events = (tmp_path / "events.jsonl").read_bytes()
    done, _ = trained(tmp_path, run_of(), first_step=stopped)
    assert (tmp_path / "events.jsonl").read_bytes() == events
    last = max(version for what, version in whole if what == "published" and version <= stopped)
    assert done == [("published", last), *[(what, step) for what, step in whole if step > stopped]]


def test_a_last_step_needs_no_refresh(tmp_path: Path) -> None:
    one = run_of()
    (stage,) = one.stages
    schedule = replace(stage.schedule, limit=20 * 8)
    trained(tmp_path, replace(one, stages=(replace(stage, schedule=schedule),)))
    assert [e.step for e in read_rows(tmp_path, Event) if e.kind == "refreshed"] == [4, 8, 16]


def test_a_guarded_set_that_fell_refuses_the_refresh(tmp_path: Path) -> None:
    """The simulated model forgets the set at version 3 (test_retention)."""
    guarded = run_of(detectors=None, max_drop=0.1)
    evaluation = EvaluationConfig.model_validate({"every": 2, "sets": [SET]})
    config = guarded.config.model_copy(update={"evaluation": evaluation})
    one = replace(guarded, config=config, common=[loaded(evaluation.sets[0])], tokenizer=Forgetting())
    trained(tmp_path, one)
    fell = {r.step for r in read_rows(tmp_path, EvalResult) if r.metric == "accuracy" and r.value == 0}
    assert fell == {10}
    events = [(e.step, e.kind) for e in read_rows(tmp_path, Event)]
    assert events == [
        (4, "refreshed"),
        (8, "refreshed"),
        (10, "fell"),
        (12, "refused"),
        (16, "refreshed"),
        (20, "refreshed"),
    ]
    (refused,) = [e for e in read_rows(tmp_path, Event) if e.kind == "refused"]
    assert refused.text == "old fell from 100 % to 0.0 % (n 1) at step 10: 100.0 points, 10 are allowed"


class Forgetting(Tokens):
    """Replaces a tokenizer: the long replies of version 10 are wrong."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "right" if len(ids) == 10 else "forgotten"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {"weights": "gated"}}, "weights gated needs the steps between two refreshes; set teacher.refresh"),
        ({"teacher": {"refresh_every": 4}}, "refresh_every has no effect with weights ema; set weights: gated, or"),
        ({"teacher": GATED | {"alpha": 0.1}}, "alpha has no effect with weights gated"),
        ({"teacher": GATED}, "teacher.weights gated needs the retention guard"),
        (
            {"teacher": GATED, "retention": {"max_drop": 0.1}, "evaluation": {"sets": [SET]}},
            "refresh_every 4 needs an evaluation of the guarded sets before each refresh; set evaluation.every to at",
        ),
        (
            {"teacher": GATED, "retention": {"max_drop": 0.1}, "evaluation": {"every": 5, "sets": [SET]}},
            "refresh_every 4 needs an evaluation of the guarded sets before each refresh",
        ),
        (
            {"teacher": GATED, "retention": {"detectors": {"window": 3}}},
            "refresh_every 4 is less than two windows of retention.detectors, .*; raise it to 6, or lower window",
        ),
        (
            {
                "teacher": GATED,
                "retention": DETECTORS,
                "weights": {"teacher_sync_every": 2},
            },
            "teacher_sync_every has no effect with teacher.weights gated",
        ),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate(LEAST | changes)


def test_a_refresh_that_is_never_due_is_refused() -> None:
    one = run_of()
    schedules = [stage.schedule for stage in one.stages]
    for every, fits in ((STEPS - 1, True), (STEPS, False)):
        teacher = TeacherConfig(weights="gated", refresh_every=every)
        config = one.config.model_copy(update={"teacher": teacher})
        if fits:
            check_guard(config, schedules)
            continue
        with pytest.raises(UserError, match="refresh_every 21 is never due: the longest stage has 21 steps"):
            check_guard(config, schedules)


def test_what_decides_on_a_gated_teacher_may_not_change_when_a_run_is_resumed() -> None:
    def fingerprint(teacher: dict[str, Any], **changes: Any) -> str:
        settings = LEAST | {"teacher": teacher, "retention": DETECTORS} | changes
        (task,) = RunConfig.model_validate(settings).tasks
        return fingerprint_of("", task, b"", ())

    other = {"detectors": {"window": WINDOW, "length": 3.0}}
    assert fingerprint(GATED) != fingerprint(GATED, retention=other)
    assert fingerprint(GATED) != fingerprint(GATED | {"refresh_every": 5})
    assert fingerprint(GATED) == fingerprint(GATED, retention=DETECTORS | {"action": "stop"})
    assert fingerprint(GATED) == fingerprint(GATED, evaluation={"every": 3})  # no set is guarded
    frozen = {"weights": "frozen"}
    assert fingerprint(frozen) == fingerprint(frozen, retention=other)
