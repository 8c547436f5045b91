"""Engines that are split over GPUs or processes: what they reserve, and what cannot be split."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.planning.plan import engine_settings, make_plan
from sdft.services.planning.shape import ModelShape
from sdft.services.planning.split import check_split

SHAPE = ModelShape(parameters=1_000_000, layers=2, hidden=128, intermediate=128, vocabulary=512, heads=2)


def config(student: dict[str, Any], **changes: Any) -> RunConfig:
    """Return a configuration with these settings of the student pool."""
    settings: dict[str, Any] = {
        "model": "any",
        "data": {"train": "any.jsonl", "max_prompt_tokens": 500, "max_teacher_prompt_tokens": 1000},
        "training": {"steps": 1},
        "device": "cpu",
        "dtype": "float32",
        "actors": {"student": student},
    }
    return RunConfig.model_validate(settings | changes)


def test_an_engine_reserves_a_whole_gpu_for_each_part() -> None:
    plan = make_plan(config({"tensor_parallel": 4, "replicas": 2}, device="cuda"), SHAPE, [100])
    assert [(part.name, part.gpus) for part in plan.parts] == [
        ("student engine 0", 4),
        ("student engine 1", 4),
        ("teacher engine 0", 1),
        ("learner rank 0", 1),
    ]
    assert plan.parts[0].bundle == {"CPU": 0.5, "GPU": 4}
    assert plan.text().splitlines()[1].split()[:5] == ["student", "engine", "0", "0.5", "4"]
    assert plan.gpus == 10


def test_an_engine_on_a_cpu_reserves_no_gpu_and_needs_memory_for_each_process() -> None:
    split, whole = (make_plan(config({"tensor_parallel": n}), SHAPE, [100]) for n in (2, 1))
    assert split.gpus == 0
    assert split.parts[0].memory_gib > whole.parts[0].memory_gib


def test_the_settings_of_an_engine_say_its_parts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    parts = [engine_settings(config(s), tmp_path, "student").tensor_parallel for s in ({}, {"tensor_parallel": 2})]
    assert parts == [1, 2]


@pytest.mark.parametrize(
    ("student", "changes", "why"),
    [
        (
            {"tensor_parallel": 2, "gpus": 0.5, "kv_cache_gib": 1},
            {"device": "cuda"},
            "actors.student.gpus 0.5 is not possible with actors.student.tensor_parallel 2, .*; remove gpus",
        ),
        (
            {"tensor_parallel": 2, "gpus": 2},
            {"device": "cuda"},
            "actors.student.gpus 2 is not possible with actors.student.tensor_parallel 2, .*; remove gpus",
        ),
        (
            {"tensor_parallel": 2},
            {"weights": {"transport": "broadcast"}},
            "weights.transport broadcast .* actors.student.tensor_parallel is 2; set weights.transport: memory",
        ),
        (
            {"tensor_parallel": 2, "threads": 3},
            {},
            "threads 3 cannot be divided among the 2 processes of tensor_parallel; set threads to a multiple of 2",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    student: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValidationError, match=why):
        config(student, **changes)


@pytest.mark.parametrize(
    ("shape", "parts", "name", "fits"),
    [
        ({"num_attention_heads": 6}, 4, "num_attention_heads 6", 3),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, "num_key_value_heads 6", 3),
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 4, "num_key_value_heads 2", 2),
        ({"num_attention_heads": 8, "linear_num_key_heads": 4}, 8, "linear_num_key_heads 4", 4),
        ({"num_attention_heads": 8, "intermediate_size": 100}, 8, "intermediate_size 100", 4),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, 2, "num_attention_heads 7", 1),
        ({"intermediate_size": 100, "moe_intermediate_size": 6}, 4, "moe_intermediate_size 6", 3),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(shape: dict[str, Any], parts: int, name: str, fits: int) -> None:
    why = rf"actors\.student\.tensor_parallel is {parts}, and the model in m has {name}, .*; set it to {fits}$"
    with pytest.raises(UserError, match=why):
        check_split("student", parts, "cuda", Path("m"), shape)


@pytest.mark.parametrize(
    ("shape", "parts", "fits"),
    [({}, 5, 4), ({}, 16, 8), ({"num_attention_heads": 6}, 6, 3), ({"num_experts": 8}, 4, 2)],
)
def test_vllm_has_kernels_for_some_numbers_of_processes_on_a_cpu(shape: dict[str, Any], parts: int, fits: int) -> None:
    """With experts it must be two: parts that add in another order round differently, and may choose other experts."""
    with pytest.raises(UserError, match=rf"tensor_parallel is {parts}, and on a CPU .*; set it to {fits}$"):
        check_split("student", parts, "cpu", Path("m"), shape)
    check_split("student", fits, "cpu", Path("m"), shape)
    check_split("student", parts, "cuda", Path("m"), shape)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ({"num_attention_heads": 7, "intermediate_size": 11}, 1),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 96}, 4),
        ({}, 4),
    ],
)
def test_other_models_are_divided(shape: dict[str, Any], parts: int) -> None:
    check_split("student", parts, "cpu", Path("m"), shape)
