"""The example of the paper's sequence: its data are converted, its two configurations have a plan.

A few rows of the same columns stand in for the paper's data, and the built-in model for Qwen2.5-7B.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from sdft.services.grading.graders import GRADERS
from tests.papers.documents import ROOT

EXAMPLE = ROOT / "examples" / "paper"
CALLS = [{"Action": "getFact", "Action_Input": '{"limit": 1}'}, {"Action": "getImage", "Action_Input": "{}"}]
CALLED = ["Thought: a fact", "Action: getFact", 'Action Input: {"limit": 1}', "Action: getImage", "Action Input: {}"]
ASKED = [{"role": "system", "content": "Answer with a letter."}, {"role": "user", "content": "Which? A: x B: y"}]
SETS: dict[str, list[dict[str, Any]]] = {
    "tooluse_data/train_data": [{"prompt": "A fact and an image", "golden_response": CALLED, "name": "Axolotl"}] * 40,
    "tooluse_data/eval_data": [{"prompt": "A fact and an image", "golden_answer": CALLS, "name": "Axolotl"}] * 3,
    "science_data/train_data": [{"messages": ASKED, "output_text": "<answer>\nB\n</answer>"}] * 40,
    "science_data/eval_data": [{"prompt": ASKED, "answer": "B"}] * 2,
}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with data from a stand-in for the clone: two sets as folders, two as files."""
    folder = tmp_path_factory.mktemp("paper")
    for number, (place, rows) in enumerate(SETS.items()):
        path = folder / "clone" / "data" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 2:
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
        else:
            path.with_name(path.name + ".json").write_text(json.dumps(rows))
    for file in EXAMPLE.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    subprocess.run([sys.executable, folder / "make_data.py", folder / "clone"], check=True, capture_output=True)
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_demonstrations_of_training_pass_the_graders_of_the_held_out_rows(example: Path) -> None:
    for task, grader, demonstration in (
        ("tools", "tool_call", "\n".join(CALLED)),
        ("science", "choice", "<answer>\nB\n</answer>"),
    ):
        train, heldout = (rows_of(example / "data" / f"{task}-{part}.jsonl") for part in ("train", "heldout"))
        assert (len(train), train[0]["demonstration"]) == (40, demonstration)
        assert len(heldout) in (2, 3)
        assert all(GRADERS[grader].check_answer(row["answer"]) is None for row in heldout)
        assert all(GRADERS[grader].grade(demonstration, row["answer"]) for row in heldout)
        assert not any(GRADERS[grader].grade("A fact", row["answer"]) for row in heldout)


@pytest.mark.parametrize(("name", "gpus"), [("paper.yaml", 8), ("lora.yaml", 1)])
def test_each_configuration_has_a_plan_for_its_gpus(example: Path, smollm2: Path, name: str, gpus: int) -> None:
    words = [sys.executable, "-m", "sdft.services.cli", "check", str(example / name), "--set", f"model={smollm2}"]
    plan = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert plan.returncode == 0, plan.stderr
    assert "tools: 40 demonstrations, 3 steps of 32 prompts" in plan.stdout
    assert "science: 40 demonstrations, 3 steps of 32 prompts" in plan.stdout
    (total,) = (line for line in plan.stdout.splitlines() if line.startswith("total"))
    assert float(total.split()[2]) == gpus


def test_a_folder_without_the_data_is_refused_in_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLE / "make_data.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tooluse_data/train_data is not there, nor is train_data.json" in done.stderr
