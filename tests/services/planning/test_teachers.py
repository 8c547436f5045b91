"""Several external teachers, before anything starts: what is refused, their pools, and what a resumed run compares."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.actors.shared.process import GIB
from sdft.services.base.errors import UserError
from sdft.services.cli.summary import stage_lines
from sdft.services.config.load import load_config, resolved_yaml
from sdft.services.config.paths import with_absolute_paths
from sdft.services.planning.plan import make_plan, pools
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import Prepared
from sdft.services.planning.shape import ModelShape
from sdft.services.serving.check import _check_settings
from tests.fakes.tiny import make_tiny_model
from tests.runs.run import write_run

ROUTES = ("math", "code", "math")
KNOWN = "; teacher.models has math and code"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "other", seed=1)


def written(folder: Path, model: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """Write a run with two teachers and these columns beside the prompts of its rows. Returns its file."""
    path = write_run(folder, model, "float32")
    config = yaml.safe_load(path.read_text())
    config["teacher"] = {"weights": "external", "models": {"math": str(model), "code": str(folder / "other")}}
    path.write_text(yaml.safe_dump(config | settings, sort_keys=False))
    pairs = [{"prompt": f"Say {i}.", "demonstration": f"It is {i}."} | row for i, row in enumerate(rows)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def ready(folder: Path, model: Path, *routes: str, **settings: Any) -> Prepared:
    path = written(folder, model, [{"teacher": route} for route in routes], **settings)
    return prepare(load_config(path), path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"teacher": {"weights": "external", "model": "a", "models": {"math": "b", "code": "c"}}},
            "teacher: model is one teacher and models are several; remove one of the two",
        ),
        (
            {"teacher": {"models": {"math": "b", "code": "c"}}},
            "teacher: models has no effect with weights ema; set weights: external, or remove models",
        ),
        (
            {"teacher": {"weights": "external", "models": {"math": "b"}}},
            "teacher: models has one teacher, math; set teacher.model to its model, or add another teacher",
        ),
        (
            {"teacher": {"weights": "external", "models": {"math": "b", "My code": "c"}}},
            "teacher: models: My code is not a name for a teacher; use lower-case letters, digits, - and _",
        ),
        (
            {"teacher": {"weights": "external"}},
            "teacher: weights external needs the teacher; set teacher.model, or teacher.models for several",
        ),
        (
            {
                "teacher": {"weights": "external", "models": {"math": "b", "code": "c"}},
                "actors": {"teacher-code": {"role": "evaluation"}},
            },
            "actors.teacher-code has the name that the pool of a teacher in teacher.models gets; rename the pool, or "
            "the teacher",
        ),
    ],
)
def test_teachers_that_contradict_are_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(json.dumps({"model": "m", "data": {"train": "t"}, "training": {"steps": 1}} | settings))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {reason}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "teacher is missing (the row has prompt, demonstration)"),
        ({"teacher": None}, "teacher is null"),
        ({"teacher": "maths"}, 'teacher is "maths", which is not a teacher'),
        ({"teacher": ["math"]}, 'teacher is ["math"], which is not a teacher'),
    ],
)
def test_a_row_names_one_of_the_teachers(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = written(tmp_path, tmp_path, [{"teacher": "math"}, row])
    with pytest.raises(UserError) as error:
        prepare(load_config(path), path)
    assert str(error.value) == f"{tmp_path / 'train.jsonl'}:2: {reason}{KNOWN}"


def test_a_question_may_leave_the_teacher_out_and_not_name_another(tmp_path: Path) -> None:
    path = written(tmp_path, tmp_path, [{"teacher": "math"}])
    question = {"prompt": "Say 1.", "answer": "1"}
    (tmp_path / "eval.jsonl").write_text(f"{json.dumps(question)}\n{json.dumps(question | {'teacher': 'x'})}\n")
    with pytest.raises(UserError) as error:
        prepare(load_config(path), path)
    assert str(error.value) == f'{tmp_path / "eval.jsonl"}:2: teacher is "x", which is not a teacher{KNOWN}'


@pytest.mark.usefixtures("other")
def test_recalled_prompts_name_the_teacher_and_the_demonstrations_beside_them_need_none(
    tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "general.jsonl").write_text(json.dumps({"prompt": "Name a colour."}) + "\n")
    path = written(tmp_path, tiny_model, [{}], method={"type": "recall", "prompts": "general.jsonl"})
    with pytest.raises(UserError, match=r"general\.jsonl:1: teacher is missing \(the row has prompt\); teacher\.model"):
        prepare(load_config(path), path)
    (tmp_path / "general.jsonl").write_text(json.dumps({"prompt": "Name a colour.", "teacher": "code"}) + "\n")
    assert [pair.route for pair in prepare(load_config(path), path).stages[0].prompts] == ["", "code"]


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path, tiny_model: Path) -> None:
    path = written(tmp_path, tiny_model, [{"teacher": "math"}])
    with pytest.raises(UserError, match=r"^teacher\.models\.code: .*other is neither a folder nor a built-in name"):
        prepare(load_config(path), path)


def test_a_teacher_with_other_tokens_is_named(tmp_path: Path, tiny_model: Path, other: Path) -> None:
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = written(tmp_path, tiny_model, [{"teacher": "math"}])
    with pytest.raises(UserError, match=r"^teacher\.models\.code: the tokens of .*other are not those of the student"):
        prepare(load_config(path), path)


def test_each_teacher_has_a_pool_with_its_folder_and_the_settings_of_the_teacher(
    tmp_path: Path, tiny_model: Path, other: Path
) -> None:
    actors = {"teacher": {"replicas": 2, "cpus": 0.25, "kv_cache_gib": 0.05}}
    one = ready(tmp_path, tiny_model, *ROUTES, actors=actors)
    assert list(one.plan.pools) == ["student", "teacher-math", "teacher-code"]
    assert [part.name for part in one.plan.pools["teacher-code"]] == [f"teacher-code engine {i}" for i in range(2)]
    assert {part.cpus for part in one.plan.pools["teacher-math"]} == {0.25}
    assert [one.folder_of(pool) for pool in one.plan.pools] == [tiny_model, tiny_model, other]
    assert [pair.route for pair in one.stages[0].prompts] == list(ROUTES)
    (line,) = stage_lines(one)
    assert line.endswith("forward divergence, external teachers math and code")


def test_the_plan_counts_each_teacher_with_its_own_parameters(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, tmp_path, []))
    shape = ModelShape(10**9, 0, 0, 0, 0, 0)
    plan = make_plan(
        config, shape, [100], {"teacher-math": shape, "teacher-code": replace(shape, parameters=3 * 10**9)}
    )
    math, code = (plan.pools[pool][0].memory_gib for pool in ("teacher-math", "teacher-code"))
    assert code - math == pytest.approx(2 * 2e9 * 4 / GIB)


def test_a_stage_without_a_teacher_needs_no_column(tmp_path: Path, tiny_model: Path) -> None:
    path = written(tmp_path, tiny_model, [{}], method="sft")
    config = load_config(path)
    assert pools(config) == ("student",)
    assert [pair.route for pair in prepare(config, path).stages[0].prompts] == [""]


def test_routes_and_models_may_not_change_on_resume_and_their_order_may(
    tmp_path: Path, tiny_model: Path, other: Path
) -> None:
    def fingerprint(routes: tuple[str, ...], **models: Path) -> str:
        teacher = {"weights": "external", "models": {name: str(model) for name, model in models.items()}}
        return ready(tmp_path, tiny_model, *routes, teacher=teacher).stages[0].fingerprint

    first = fingerprint(ROUTES, math=tiny_model, code=other)
    assert fingerprint(ROUTES, code=other, math=tiny_model) == first
    assert fingerprint(ROUTES, code=tiny_model, math=other) != first
    assert fingerprint(("math", "code", "code"), math=tiny_model, code=other) != first


def test_without_models_the_column_is_not_read(tmp_path: Path, tiny_model: Path) -> None:
    """Not even if it, or one that is called nearly so, has no text."""
    prints = []
    for columns in ({}, {"teacher": ["Ms Smith"]}, {"teachers": "both"}):
        path = written(tmp_path, tiny_model, [columns], teacher={"weights": "external", "model": str(tiny_model)})
        one = prepare(load_config(path), path)
        prints.append(one.stages[0].fingerprint)
        assert (list(one.plan.pools), one.stages[0].prompts[0].route) == (["student", "teacher"], "")
    assert len(set(prints)) == 1


def test_the_column_may_have_another_name_and_a_bad_row_of_a_log_is_skipped(
    tmp_path: Path, tiny_model: Path, other: Path
) -> None:
    path = written(tmp_path, tiny_model, [{"expert": "code"}, {"expert": "x"}, {"expert": "math"}])
    data = yaml.safe_load(path.read_text())["data"]
    config = load_config(path, [f"data={json.dumps(data | {'source': 'log', 'columns': {'teacher': 'expert'}})}"])
    source = prepare(config, path).stages[0].source
    assert [pair.route for pair in source.prompts] == ["code", "math"]
    assert list(source.skipped) == [f'{tmp_path / "train.jsonl"}:2: teacher is "x", which is not a teacher{KNOWN}']
    assert source.digest(0) != source.digest(1)


def test_the_models_survive_a_round_trip_with_absolute_paths(tmp_path: Path, other: Path) -> None:
    path = written(tmp_path, tmp_path, [], teacher={"weights": "external", "models": {"a": "other", "b": "hub/id"}})
    moved = tmp_path / "run" / "config.yaml"
    moved.parent.mkdir()
    moved.write_text(resolved_yaml(with_absolute_paths(load_config(path), tmp_path)))
    assert load_config(moved).teacher.models == {"a": str(other), "b": "hub/id"}


def test_a_service_has_one_teacher(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, tmp_path, []))
    with pytest.raises(UserError, match=r"^teacher\.models: what a service is taught names no teacher; set teacher"):
        _check_settings(config)
