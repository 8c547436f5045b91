"""The retention guard: what it judges, and its effect on a run whose guarded set falls. In simulated time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from sdft.services.base.errors import RetentionLost
from sdft.services.config.evaluation import EvaluationConfig
from sdft.services.config.run import RunConfig
from sdft.services.data.demonstrations import Record
from sdft.services.data.pairs import PromptPair
from sdft.services.data.sets import LoadedSet
from sdft.services.records.checkpoints import CheckpointState, commit, newest
from sdft.services.records.rows import EvalResult
from sdft.services.training.retention import RetentionGuard
from simulation.cluster import Case, Learner, Student, drive, prepared

GENERAL = {"name": "general", "file": "g.jsonl", "grader": "exact", "role": "retention", "max_new_tokens": 4}
LOST_FROM = 3  # from this weight version on, the simulated student has forgotten


def config(action: str = "warn", **retention: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": "m",
            "data": {"train": "a.jsonl"},
            "training": {"batch_size": 8, "steps": 5},
            "evaluation": {"every": 2, "sets": [GENERAL, GENERAL | {"name": "tools", "role": "task"}]},
            "retention": {"max_drop": 0.1, "action": action} | retention,
        }
    )


def result(step: int, value: float, task: str = "general", metric: str = "accuracy") -> EvalResult:
    return EvalResult(step, 0, task, metric, value, 10)


def test_a_set_may_drop_by_max_drop_from_its_first_value_and_no_more() -> None:
    guard = RetentionGuard(config(), [])
    assert guard.judge([result(0, 0.8), result(0, 0.9, "tools")]) == []
    assert guard.judge([result(2, 0.7), result(2, 0.1, "tools")]) == []  # 0.8 - 0.7 is slightly more than 0.1
    assert guard.held == 2
    (breach,) = guard.judge([result(4, 0.6), result(4, 0.0, metric="teacher_accuracy")])
    assert str(breach) == "general fell from 80.0 % to 60.0 % (n 10) at step 4: 20.0 points, 10 are allowed"
    assert guard.held == 2
    assert guard.judge([result(6, 0.75)]) == []
    assert guard.held == 6


def test_a_perplexity_may_rise_by_max_drop() -> None:
    texts = {"name": "prose", "file": "p.jsonl", "grader": "perplexity", "role": "retention"}
    guard = RetentionGuard(config().model_copy(update={"evaluation": EvaluationConfig(sets=(texts,))}), [])
    first, fine, worse = (result(step, ppl, "prose", "perplexity") for step, ppl in ((0, 20.0), (1, 21.9), (2, 22.5)))
    assert guard.judge([first]) == guard.judge([fine]) == []
    assert list(map(str, guard.judge([worse]))) == [
        "prose rose from perplexity 20.00 to 22.50 (n 10) at step 2: 12.5 %, 10 are allowed"
    ]
    assert guard.held == 1


def test_each_pass_at_k_of_a_guarded_set_has_a_drop_of_its_own() -> None:
    several = GENERAL | {"pass_at": [1, 4]}
    guarded = {"retention": {"max_drop": 0.1, "max_drop_pass_at": 0.3}, "evaluation": {"every": 2, "sets": [several]}}
    guard = RetentionGuard(RunConfig.model_validate(config().model_dump() | guarded), [])
    first = [result(0, 0.8), result(0, 0.9, metric="pass@1"), result(0, 1.0, metric="pass@4")]
    assert guard.judge(first) == []
    fine = [result(2, 0.8), result(2, 0.65, metric="pass@1"), result(2, 0.7, metric="pass@4")]
    assert guard.judge([*fine, result(2, 0.0, metric="teacher_pass@4")]) == []
    assert guard.held == 2
    (breach,) = guard.judge([result(4, 0.8), result(4, 0.65, metric="pass@1"), result(4, 0.6, metric="pass@4")])
    assert str(breach) == "general pass@4 fell from 100 % to 60.0 % (n 10) at step 4: 40.0 points, 30 are allowed"
    assert (guard.held, list(guard.last)) == (2, ["general pass@4"])


def test_a_guard_of_pass_at_k_that_nothing_samples_is_refused() -> None:
    with pytest.raises(ValidationError, match="no guarded set has pass_at"):
        config(max_drop_pass_at=0.3)
    with pytest.raises(ValidationError, match="set max_drop too"):
        config(max_drop=None, detectors={}, max_drop_pass_at=0.3)
    with pytest.raises(ValidationError, match="an empty phrase is in every completion"):
        config(detectors={"phrases": ["As shown", " "]})


def test_after_an_interruption_the_guard_knows_the_values_before_training() -> None:
    guard = RetentionGuard(config(), [result(4, 0.5), result(0, 0.8), result(2, 0.8)])
    assert guard.held == 2
    assert len(guard.judge([result(6, 0.6)])) == 1


def test_a_step_without_all_guarded_sets_is_not_used_for_a_rollback() -> None:
    guard = RetentionGuard(config(sets=["general", "tools"]), [])
    assert guard.judge([result(0, 0.8), result(0, 0.9, "tools")]) == guard.judge([result(1, 0.8)]) == []
    assert guard.held == 0
    guard.judge([result(2, 0.8), result(2, 0.8, "tools")])
    assert guard.held == 2


def test_a_set_that_comes_with_a_later_stage_is_not_missed_before() -> None:
    guard = RetentionGuard(config(sets=["general", "tools"]), [result(0, 0.8), result(4, 0.8)])
    assert guard.held == 4


def test_the_sets_to_guard_may_be_named() -> None:
    guard = RetentionGuard(config(sets=["tools"]), [result(0, 0.8, "tools"), result(0, 0.8)])
    assert [breach.now.task for breach in guard.judge([result(1, 0.1, "tools"), result(1, 0.1)])] == ["tools"]


def test_the_checkpoint_for_a_rollback_is_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in range(1, 8):
        part = tmp_path / "checkpoints" / f".part-{step}"
        part.mkdir()
        commit(part, tmp_path, CheckpointState(step, 1, 1, "float32", "f"), keep=2, held=3)
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-000003", "step-000006", "step-000007"]


class Forgetful(Student):
    """Replies with its weight version."""

    def generate(self, items: Any, argument: Any) -> tuple[float, Any]:
        seconds, made = super().generate(items, argument)
        return seconds, [
            replace(rollout, completion_ids=np.full_like(rollout.completion_ids, self.version)) for rollout in made
        ]


class Tokens:
    """Replaces a tokenizer: decodes a weight version to that student's reply."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "right" if ids[0] < LOST_FROM else "forgotten"


def trained(run_dir: Path, action: str) -> None:
    case = Case("guard", engines=1, staleness=0, steps=5)
    one = prepared(case, 8)
    guarded = config(action)
    questions = [
        Record(f"q{i}", ({"role": "user", "content": "?"},), None, None, None, "right", "f:1") for i in range(10)
    ]
    sets = [LoadedSet(s, questions, [PromptPair.of([1], None)] * 10) for s in guarded.evaluation.sets]
    settings = one.config.model_copy(
        update={
            "evaluation": guarded.evaluation,
            "retention": guarded.retention,
            "checkpoint": one.config.checkpoint.model_copy(update={"every": 1, "keep": 1}),
        }
    )
    one = replace(one, config=settings, common=sets, tokenizer=Tokens())
    with (run_dir / "log").open("w") as said:
        drive(one, run_dir, case, lambda number: Forgetful(number, case), Learner(0.1), said)


def last_checkpoint(run_dir: Path) -> str:
    folder, _ = newest(run_dir)
    return folder.name if folder is not None else "none"


def test_action_warn_continues_and_keeps_the_replies(tmp_path: Path) -> None:
    trained(tmp_path, "warn")
    assert "general fell from 100 % to 0.0 % (n 10) at step 4" in (tmp_path / "log").read_text()
    rows = [json.loads(line) for line in (tmp_path / "retention-step-000004.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows if "text" in row] == ["forgotten"] * 10
    assert last_checkpoint(tmp_path) == "step-000005"


def test_action_stop_ends_the_run_at_a_checkpoint_of_that_step(tmp_path: Path) -> None:
    with pytest.raises(RetentionLost, match="continues from it") as error:
        trained(tmp_path, "stop")
    assert error.value.exit_code == 4
    assert last_checkpoint(tmp_path) == "step-000004"


def test_the_guard_acts_even_if_the_replies_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / ".retention-step-000004.jsonl.part").mkdir()
    with pytest.raises(RetentionLost, match=r"the replies could not be written \(.*; rolled back to step-000002"):
        trained(tmp_path, "rollback")
    assert last_checkpoint(tmp_path) == "step-000002"


def test_a_run_that_cannot_go_back_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".latest.part").mkdir(parents=True)  # so that `latest` cannot be written
    with pytest.raises(RetentionLost, match=r"it held at step 2, and the run is not rolled back: .*/checkpoints: the"):
        trained(tmp_path, "rollback")


def test_action_rollback_makes_the_last_good_checkpoint_the_newest(tmp_path: Path) -> None:
    with pytest.raises(RetentionLost, match="rolled back to step-000002"):
        trained(tmp_path, "rollback")
    assert last_checkpoint(tmp_path) == "step-000002"
    assert len(list((tmp_path / "checkpoints").glob("aside-*-step-000004"))) == 1
