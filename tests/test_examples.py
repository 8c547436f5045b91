"""The examples' own configurations train: two real steps each on the real model, in bfloat16 as they are shipped."""

from pathlib import Path

import pytest

from services.metrics import read_jsonl
from tests.runs import finish, metrics

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ("training.steps=2", "evaluation.sets=[]")  # the sets are asked by the tests of `sdft eval` and of the data


@pytest.fixture(scope="module")
def tools(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert smollm2.is_dir()
    run_dir = tmp_path_factory.mktemp("tools") / "run"
    finish(EXAMPLES / "tools" / "tools.yaml", run_dir, *SHORT)
    return run_dir


def test_the_tool_example_trains_and_its_teacher_knows_better(tools: Path) -> None:
    rows = read_jsonl(tools / "metrics.jsonl")
    assert [row["trained"] for row in rows] == [8, 16]
    # The teacher has been shown the call: on the student's first answers it is far from the student.
    assert 0.1 < rows[0]["divergence"] < 10


def test_the_same_configuration_gives_the_same_run_bit_for_bit(tools: Path, tmp_path: Path) -> None:
    finish(EXAMPLES / "tools" / "tools.yaml", tmp_path / "again", *SHORT)
    assert metrics(tmp_path / "again") == metrics(tools)
    student = Path("checkpoints") / "step-000002" / "student" / "model.safetensors"
    assert (tmp_path / "again" / student).read_bytes() == (tools / student).read_bytes()


def test_the_fact_example_trains(tmp_path: Path) -> None:
    finish(EXAMPLES / "facts" / "facts.yaml", tmp_path / "run", *SHORT)
    assert [row["trained"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [8, 16]
