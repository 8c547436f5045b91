"""The benchmarks of a GPU run without one, on a tiny model: each gives its rows."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import engines, learner, training, update
from benchmarks.measure import in_a_process
from benchmarks.shapes import random_model

pytestmark = pytest.mark.whole


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_model("tiny", tmp_path, "cpu")


@pytest.mark.parametrize("lora", [None, 4])
def test_a_learner_step(lora: int | None) -> None:
    case = learner.Case("cpu", "tiny", tokens=256, micro_batch=128, checkpointing=lora is not None, lora=lora)
    row: dict[str, Any] = in_a_process(partial(learner.measure, case))
    assert row["tokens"] == 256
    assert 0 < row["of a large product"] < 1


def test_an_engine_beside_plain_vllm(ray_cluster: None, model: Path) -> None:
    ours, plain = engines.measure(model, "cpu")
    assert (ours["engine"], plain["engine"], plain["of plain vLLM"]) == ("sdft", engines.PLAIN, 1)
    assert ours["ms per decoding step"] > 0
    assert ours["scored tokens/s"] > 0


def test_a_weight_update(ray_cluster: None, model: Path) -> None:
    student, teacher = update.measure(model, "cpu", "memory")
    assert (student["role"], teacher["role"]) == ("student", "teacher")
    for row in (student, teacher):
        assert 0 < row["pause s"] < row["load s"] < row["whole s"]


def test_steps_of_a_run(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f"{training.json.dumps(row)}\n" for row in training.rows("cpu")))
    found = training.steps(tmp_path, "strict", training.configuration(model, "cpu", 1, "memory", staleness=0))
    assert [row["step"] for row in found] == list(range(training.WARM + 1, training.STEPS))
    assert all(row["time_step_s"] > 0 for row in found)
