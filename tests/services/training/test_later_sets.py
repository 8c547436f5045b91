"""Evaluation sets that are added later, with an appended stage or alone, are evaluated before training continues.

In simulated time.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sdft.services.analysis.matrix import make_matrix
from sdft.services.analysis.report import write_report
from sdft.services.config.evaluation import EvaluationSet, RetentionConfig
from sdft.services.data.demonstrations import Record
from sdft.services.data.pairs import PromptPair
from sdft.services.data.schedule import make_schedule
from sdft.services.data.sets import LoadedSet
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.prepared import Prepared
from sdft.services.records.rows import EvalResult, read_jsonl
from simulation.cluster import Case, Learner, drive, prepared
from tests.runs.run import metrics
from tests.services.training.test_retention import LOST_FROM, Forgetful, Tokens

STEPS = LOST_FROM - 1  # of the first stage; the student forgets in the second
OLD = EvaluationSet(name="old", file="q.jsonl", grader="exact", role="retention", max_new_tokens=4)
NEW = OLD.model_copy(update={"name": "new", "pass_at": (1,)})
CASE = Case("later", engines=1, staleness=0)


class Staged(Learner):
    """A learner of a run of stages, which resumes from a step."""

    def __init__(self, step: int) -> None:
        super().__init__(0.1)
        self._step = step

    async def begin_stage(self) -> None: ...


def loaded(settings: EvaluationSet) -> LoadedSet:
    question = Record("q", ({"role": "user", "content": "?"},), "It is right.", None, None, "right", "f:1")
    return LoadedSet(settings, [question], [PromptPair.of([1], [2, 1])])


def run_of(stages: int, sets: Sequence[EvaluationSet]) -> Prepared:
    one = prepared(CASE, 8)
    (stage,) = one.stages
    task = stage.config.model_copy(update={"training": stage.config.training.model_copy(update={"steps": STEPS})})
    schedules = make_schedule([task] * stages, [stage.source] * stages).stages
    each = tuple(replace(stage, name=f"s{i}", schedule=schedule) for i, schedule in enumerate(schedules))
    evaluation = one.config.evaluation.model_copy(update={"sets": tuple(sets)})
    config = one.config.model_copy(update={"evaluation": evaluation, "retention": RetentionConfig(max_drop=0.1)})
    return replace(one, config=config, stages=each, common=[loaded(s) for s in sets], tokenizer=Tokens())


def trained(run_dir: Path, one: Prepared, first_step: int = 0) -> str:
    """Train from `first_step` to the end, beginning as session.py does. Returns the output."""
    RunLog.rewind(run_dir, first_step or None)
    with (run_dir / "log").open("w") as said:
        drive(
            one, run_dir, CASE, lambda number: Forgetful(number, CASE), Staged(first_step), said, first_step=first_step
        )
    return (run_dir / "log").read_text()


def asked(run_dir: Path) -> list[tuple[int, str, str]]:
    return [(row["step"], row["task"], row["metric"]) for row in read_jsonl(run_dir / "eval.jsonl")]


def appended(run_dir: Path) -> str:
    """Train a run of one stage, then append a second one with its own set. Returns the output of the second part."""
    trained(run_dir, run_of(1, [OLD]))
    shutil.copy(run_dir / "ledger.sqlite", run_dir / "at-the-checkpoint.sqlite")
    return trained(run_dir, run_of(2, [OLD, NEW]), STEPS)


def test_a_new_set_is_evaluated_before_training_continues(tmp_path: Path) -> None:
    assert f"evaluation at step {STEPS}  new 100 % (n 1)" in appended(tmp_path)
    rows = asked(tmp_path)
    assert max(Counter(rows).values()) == 1
    assert [(step, metric) for step, task, metric in rows if task == "new"] == [
        (STEPS, "accuracy"),
        (STEPS, "pass@1"),
        (STEPS, "teacher_accuracy"),
        (STEPS, "teacher_pass@1"),
        (2 * STEPS, "accuracy"),
        (2 * STEPS, "pass@1"),
    ]
    assert [step for step, task, metric in rows if (task, metric) == ("old", "accuracy")] == [0, STEPS, 2 * STEPS]
    (tmp_path / "config.yaml").write_text("{}")
    assert f"Before: step 0 (new: {STEPS}). After: step {2 * STEPS}." in write_report(tmp_path).read_text()


def test_a_run_killed_after_the_evaluation_of_a_new_set_does_not_repeat_it(tmp_path: Path) -> None:
    """From the checkpoint that the stage was appended to."""
    appended(tmp_path)
    rows, steps = (tmp_path / "eval.jsonl").read_bytes(), metrics(tmp_path)
    shutil.copy(tmp_path / "at-the-checkpoint.sqlite", tmp_path / "ledger.sqlite")
    said = trained(tmp_path, run_of(2, [OLD, NEW]), STEPS)
    assert f"evaluation at step {STEPS}" not in said
    assert f"evaluation at step {2 * STEPS}" in said
    assert ((tmp_path / "eval.jsonl").read_bytes(), metrics(tmp_path)) == (rows, steps)
    assert steps[-1]["trained"] == 8 * 2 * STEPS


@pytest.mark.parametrize("cut_off_at", ["reply", "evaluation"])
def test_an_evaluation_that_is_cut_off_while_it_is_written_is_made_again_whole(
    cut_off_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    appended(tmp_path / "whole")
    cut = tmp_path / "cut"
    trained(cut, run_of(1, [OLD]))
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, cut_off_at, killed)
        with pytest.raises(RuntimeError, match="killed"):
            trained(cut, run_of(2, [OLD, NEW]), STEPS)
    trained(cut, run_of(2, [OLD, NEW]), STEPS)
    for file in ("eval.jsonl", "samples.jsonl"):  # the simulated engines give replies of random lengths
        cut_rows, whole_rows = (
            [row | {"tokens": 0} for row in read_jsonl(d / file)] for d in (cut, tmp_path / "whole")
        )
        assert cut_rows == whole_rows


def test_without_new_sets_a_continued_run_asks_nothing_before_it_trains(tmp_path: Path) -> None:
    trained(tmp_path, run_of(1, [OLD]))
    said = trained(tmp_path, run_of(2, [OLD]), STEPS)
    assert f"evaluation at step {STEPS}" not in said


def test_the_guard_compares_a_new_set_with_its_first_evaluation(tmp_path: Path) -> None:
    assert "new fell from 100 % to 0.0 % (n 1)" in appended(tmp_path)


def test_a_task_without_a_value_before_training_is_left_out_of_the_transfers() -> None:
    config = {
        "stages": [{"name": name, "sets": [{"name": name, "role": "task"}]} for name in "abc"],
        "evaluation": {"sets": []},
    }
    values = {0: {"a": 0.1, "b": 0.2}, 1: {"a": 0.9, "b": 0.5}, 2: {"a": 0.8, "b": 0.9, "c": 0.3}, 3: {"a": 0.7}}
    values[3] |= {"b": 0.8, "c": 0.9}
    rows = [EvalResult(step, 0, task, "accuracy", v, 10) for step, row in values.items() for task, v in row.items()]
    found = make_matrix(config, [("a", 1), ("b", 2), ("c", 3)], rows).metrics()
    assert abs(found["forward transfer"] - (0.5 - 0.2)) < 1e-9
    assert abs(found["backward transfer"] - ((0.7 - 0.9) + (0.8 - 0.9)) / 2) < 1e-9
