"""Streams of tasks: configuration, steps, the order of stages, and the metrics over stages."""

import asyncio
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.services.analysis.matrix import make_matrix, matrix_text, over_runs
from sdft.services.base.errors import UserError
from sdft.services.config.append import appended
from sdft.services.config.load import load_config, resolved_yaml
from sdft.services.config.run import RunConfig
from sdft.services.data.schedule import make_schedule
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import learner_settings
from sdft.services.records.ledger import Ledger
from sdft.services.records.rows import EvalResult
from sdft.services.records.settings import read_config
from sdft.services.training.rollouts import Rollouts
from simulation import virtual_time
from simulation.cluster import Case, Student, Teacher, pool, prepared
from tests.fakes.sources import numbered
from tests.runs.run import write_stages

A = {"name": "a", "data": {"train": "a.jsonl"}, "steps": 3}
B = {
    "name": "b",
    "data": {"train": "b.jsonl", "template": "turn"},
    "epochs": 2,
    "method": "dft",
    "optimizer": {"lr": 1e-3},
    "sampling": {"generations": 2},
}
RUN = {"model": "m", "training": {"batch_size": 4}, "stages": [A, B]}


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(RUN | changes)


def message(tmp_path: Path, settings: dict[str, Any]) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError) as error:
        load_config(path)
    return str(error.value)


def test_a_stage_is_configured_as_a_run_of_its_own_would_be() -> None:
    a, b = config(learner={"optimizer": {"lr": 5e-6}, "ranks": 2}).tasks
    assert (a.data.train, a.training.steps, a.training.batch_size, a.method.type) == ("a.jsonl", 3, 4, "sdft")
    assert (b.data.template, b.training.epochs, b.training.steps, b.sampling.generations) == ("turn", 2, None, 2)
    assert (a.learner.optimizer.lr, b.learner.optimizer.lr, b.learner.ranks) == (5e-6, 1e-3, 2)
    assert (a.method.teacher_scores, b.method.teacher_scores) == (True, False)
    assert [loss.name for loss in b.method.losses] == ["dft"]


def test_a_run_without_stages_is_its_own_only_task() -> None:
    alone = RunConfig.model_validate(
        {"model": "m", "data": {"train": "a.jsonl"}, "training": {"epochs": 1, "batch_size": 2}}
    )
    (task,) = alone.tasks
    assert task.model_dump(exclude={"keep_moments"}) == alone.model_dump()


def test_stages_survive_being_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(resolved_yaml(config()))
    assert load_config(path) == config()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"train": "c.jsonl"}}, "a run with stages must not set data; set it in each stage instead"),
        ({"training": {"steps": 3}}, "a run with stages must not set training.epochs or training.steps"),
        ({"stages": [A, B | {"name": "a"}]}, "two stages have the same name, a; rename one"),
        ({"stages": []}, "data is required but missing; set data.train to the file of demonstrations"),
        ({"stages": [A | {"epochs": 1}]}, "stages[0]: give exactly one of epochs and steps"),
        ({"stages": [A | {"optimiser": {}}]}, "stages[0].optimiser is not a setting; did you mean stages"),
        ({"stages": [A | {"optimizer": {"grad_clip": 5}}]}, "stages[0].optimizer.grad_clip 5 must equal learner.opti"),
        ({"retention": {"max_drop": 0.1}}, "retention: no evaluation set has role: retention"),
        (
            {"retention": {"max_drop": 0.1, "sets": ["x"]}},
            "retention.sets: there is no evaluation set x; the sets are ",
        ),
    ],
)
def test_an_invalid_stream_is_refused_with_one_sentence(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in message(tmp_path, RUN | changes)


def test_two_sets_of_one_name_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    one = {"name": "x", "file": "x.jsonl", "grader": "exact"}
    stages = [A | {"sets": [one]}, B]
    assert "two evaluation sets have the same name, x" in message(
        tmp_path, RUN | {"stages": stages, "evaluation": {"sets": [one]}}
    )


def test_steps_are_counted_through_the_stages_and_every_sample_belongs_to_one() -> None:
    schedule = make_schedule(config().tasks, [numbered(5), numbered(7)])
    assert [(s.before, s.last) for s in schedule.stages] == [(0, 3), (3, 7)]  # 12 prompts; 14, the last batch of 2
    assert schedule.total_steps == 7
    issued: Counter[Any] = Counter()
    for step in range(1, 8):
        batch = schedule.batch(step)
        assert {s.stage for s in batch} == {schedule.at(step).stage}
        issued.update((s.stage, s.epoch) for s in batch)
        assert schedule.issued_through(step) == issued
    assert issued[1, 0] == issued[1, 1] == 14  # 7 demonstrations, 2 rollouts each
    assert schedule.at(0).stage == 0
    assert Counter(s.record for step in range(4, 8) for s in schedule.batch(step)) == dict.fromkeys(range(7), 4)


def test_nothing_of_a_stage_is_begun_before_it_is_open(tmp_path: Path) -> None:
    """Otherwise the teacher of the stage before would score it."""
    case = Case("stages", engines=1, staleness=2, steps=2)
    one = prepared(case, 4)
    stage = one.stages[0]
    schedule = make_schedule([stage.config] * 2, [stage.source] * 2)
    both = replace(one, stages=tuple(replace(stage, schedule=s) for s in schedule.stages))

    async def run() -> list[int]:
        students, teachers = pool(case, "student", 1, lambda n: Student(n, case)), pool(case, "teacher", 1, Teacher)
        await asyncio.gather(students.start(), teachers.start())
        rollouts = Rollouts(both, students, {"": teachers}, Ledger(tmp_path / "ledger.sqlite"), ready, 0)
        begun = []
        rollouts.begin(0)
        begun.append(rollouts.begun)
        for opened in both.schedule.stages:
            rollouts.open(opened)
            rollouts.begin(1)
            begun.append(rollouts.begun)
        await rollouts.stop()
        return begun

    assert virtual_time.run(run()) == [0, 2, 4]


async def ready() -> None: ...


def test_an_appended_stage_leaves_the_fingerprints_of_earlier_stages_unchanged(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = write_stages(tmp_path, tiny_model)
    whole = load_config(path)
    short = whole.model_copy(update={"stages": whole.stages[:1]})
    before, after = prepare(short, path), prepare(whole, path)
    assert [s.fingerprint for s in after.stages][:1] == [s.fingerprint for s in before.stages]
    first, second = whole.stages
    changed = first.model_copy(update={"steps": 9})
    other = prepare(whole.model_copy(update={"stages": (changed, second)}), path)
    assert {s.fingerprint for s in other.stages}.isdisjoint(s.fingerprint for s in after.stages)


def test_a_stage_that_does_not_fit_behind_the_others_is_refused(tmp_path: Path) -> None:
    """The checks are those of a whole configuration."""
    sets = [{"name": "x", "file": "x.jsonl", "grader": "exact"}]
    run_dir, more = tmp_path / "run", tmp_path / "more.yaml"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(resolved_yaml(config(stages=[A | {"sets": sets}])))
    for changes, expected in (
        ({"sets": sets}, "more.yaml: two evaluation sets have the same name, x; rename one"),
        ({"optimizer": {"grad_clip": 5}}, "more.yaml: optimizer.grad_clip 5 must equal learner.optimizer"),
        ({"name": "a"}, "more.yaml: .*run already has another stage named a; rename the new stage"),
    ):
        more.write_text(yaml.safe_dump(B | changes))
        with pytest.raises(UserError, match=expected):
            appended(run_dir, tmp_path, [], more)
    for clip in (1, 5):  # both are the run's own value; the default does not matter
        more.write_text(yaml.safe_dump(B | {"optimizer": {"grad_clip": clip}}))
        stages = appended(run_dir, tmp_path, [f"learner.optimizer.grad_clip={clip}"], more).stages
        assert [stage.name for stage in stages] == ["a", "b"]


def test_a_stage_is_good_if_it_is_good_for_the_run_it_is_appended_to(tmp_path: Path) -> None:
    run_dir, more = tmp_path / "run", tmp_path / "more.yaml"
    run_dir.mkdir()
    more.write_text(yaml.safe_dump(B))
    runs: tuple[dict[str, Any], ...] = (
        {"dtype": "float32", "learner": {"zero_stage": 0}},
        {"device": "cuda", "learner": {"ranks": 64}, "training": {"batch_size": 64}},
        {"actors": {"teacher": {"max_replicas": 3}}, "training": {"batch_size": 4, "max_staleness": 1}},
    )
    for run in runs:
        (run_dir / "config.yaml").write_text(resolved_yaml(config(stages=[A], **run)))
        assert [stage.name for stage in appended(run_dir, tmp_path, [], more).stages] == ["a", "b"]


def test_the_same_command_appends_once_whatever_it_sets(tmp_path: Path) -> None:
    run_dir, more, own = tmp_path / "run", tmp_path / "more.yaml", tmp_path / "own.jsonl"
    run_dir.mkdir()
    own.touch()
    more.write_text(yaml.safe_dump(B))
    alone = {"model": "m", "data": {"train": str(own)}, "training": {"steps": 4}}
    sets = [{"name": n, "file": str(own), "grader": "exact", "role": r} for n, r in (("a", "task"), ("b", "retention"))]
    alone["evaluation"] = {"sets": sets}
    (run_dir / "config.yaml").write_text(resolved_yaml(RunConfig.model_validate(alone)))
    overrides = ["training.steps=4", "data.train=own.jsonl", "learner.threads=1"]
    overrides += ["evaluation.sets.a.rows=10", "evaluation.sets.b.rows=20"]
    once = appended(run_dir, tmp_path, overrides, more)
    (run_dir / "config.yaml").write_text(resolved_yaml(once))
    assert appended(run_dir, tmp_path, overrides, more) == once
    first = once.stages[0]
    assert (first.name, first.data.train, first.steps) == ("run", str(own), 4)
    assert [(s.name, s.rows) for s in once.sets] == [("b", 20), ("a", 10)]


def test_a_run_that_is_named_by_a_date_has_a_stage_of_that_name(tmp_path: Path) -> None:
    run_dir, more = tmp_path / "2026-11-27", tmp_path / "more.yaml"
    run_dir.mkdir()
    more.write_text(yaml.safe_dump(B))
    alone = {"model": "m", "data": {"train": "a.jsonl"}, "training": {"steps": 4}}
    (run_dir / "config.yaml").write_text(resolved_yaml(RunConfig.model_validate(alone)))
    (run_dir / "config.yaml").write_text(resolved_yaml(appended(run_dir, tmp_path, [], more)))
    assert [stage["name"] for stage in read_config(run_dir)["stages"]] == ["2026-11-27", "b"]


def test_the_learner_knows_its_stages(tiny_model: Path, tmp_path: Path) -> None:
    path = write_stages(tmp_path, tiny_model)
    config = load_config(path)
    first, second = config.stages
    kept = second.model_copy(update={"keep_moments": True})
    for stage in (second, kept):
        settings = learner_settings(prepare(config.model_copy(update={"stages": (first, stage)}), path))
        assert [(s.before, s.steps) for s in settings.stages] == [(0, 2), (2, 2)]
        assert [settings.stage_of(step) for step in (0, 1, 2, 3, 4, 5)] == [0, 0, 0, 1, 1, 1]
        assert [s.keep_moments for s in settings.stages] == [False, stage is kept]


SETS = {
    "stages": [
        {"name": name, "sets": [{"name": f"{name}-{i}", "role": "task"} for i in range(count)]}
        for name, count in (("a", 2), ("b", 1), ("c", 1))
    ],
    "evaluation": {"sets": [{"name": "general", "role": "retention"}]},
}
STAGES = [("a", 10), ("b", 20), ("c", 30)]
VALUES = {  # step -> a-0, a-1, b-0, c-0, general
    0: (0.0, 0.2, 0.1, 0.0, 0.9),
    10: (0.8, 0.8, 0.2, 0.0, 0.9),
    20: (0.9, 0.9, 0.7, 0.1, 0.8),
    30: (0.6, 0.6, 0.6, 0.5, 0.7),
}


def results(steps: tuple[int, ...], shift: float = 0.0) -> list[EvalResult]:
    names = ("a-0", "a-1", "b-0", "c-0", "general")
    inside = [EvalResult(15, 1, "b-0", "accuracy", 0.99, 100), EvalResult(30, 2, "a-0", "teacher_accuracy", 1.0, 100)]
    return inside + [
        EvalResult(step, 0, name, "accuracy", value + shift, 100)
        for step in steps
        for name, value in zip(names, VALUES[step], strict=True)
    ]


def test_the_metrics_of_a_stream_are_those_of_their_formulas() -> None:
    matrix = make_matrix(SETS, STAGES, results((0, 10, 20, 30)))
    assert (matrix.tasks, matrix.retention) == (("a", "b", "c"), ("general",))
    assert matrix.rows[0] == pytest.approx((0.1, 0.1, 0.0, 0.9))
    metrics = matrix.metrics()
    assert metrics == pytest.approx(
        {
            "average accuracy": (0.6 + 0.6 + 0.5) / 3,
            "backward transfer": ((0.6 - 0.8) + (0.6 - 0.7)) / 2,
            "forward transfer": ((0.2 - 0.1) + (0.1 - 0.0)) / 2,
            "forgetting a": 0.9 - 0.6,
            "forgetting b": 0.7 - 0.6,
            "retention general": 0.7,
        }
    )


def test_an_unfinished_stream_has_the_metrics_of_its_finished_stages() -> None:
    matrix = make_matrix(SETS, STAGES, results((0, 10)))
    assert matrix.row_names == ("before", "after a")
    metrics = matrix.metrics()
    assert metrics["average accuracy"] == pytest.approx(0.8)
    assert math.isnan(metrics["backward transfer"])
    assert "nan" not in matrix_text([matrix])
    assert make_matrix(SETS, STAGES, []).rows == ()


def test_several_runs_give_the_mean_and_its_interval() -> None:
    runs = [make_matrix(SETS, STAGES, results((0, 10, 20, 30), shift)) for shift in (-0.03, 0.0, 0.03)]
    estimate = over_runs([run.metrics() for run in runs])["average accuracy"]
    assert estimate.mean == pytest.approx(1.7 / 3)
    assert estimate.half == pytest.approx(4.303 * 0.03 / math.sqrt(3))
    text = matrix_text(runs)
    assert "average accuracy        56.7 ± 7.5 %" in text
    assert "backward transfer       −15.0 ± 0.0 %" in text
    begun = [make_matrix(SETS, STAGES, results((0, 10), shift)) for shift in (0.0, 0.03)]
    assert math.isnan(over_runs([run.metrics() for run in begun])["backward transfer"].half)
    assert "average accuracy        81.5 ± " in matrix_text(begun)
    with pytest.raises(UserError, match="these runs differ in stages, evaluation sets or progress"):
        matrix_text([runs[0], make_matrix(SETS, STAGES, results((0, 10)))])
