"""A real run with two external teachers: each scores and completes the samples of its records, with its own weights."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sdft.services.config.load import load_config
from sdft.services.planning.prepare import prepare
from sdft.services.records.batches import read_batch
from sdft.services.records.rows import TEACHER_ACCURACY, EvalResult, read_jsonl, read_rows
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS, make_tiny_model
from tests.runs.run import command, write_run

pytestmark = pytest.mark.whole

ROUTES = ("math", "code", "code")  # of the rows, in turn
EACH = 2  # steps of a stage


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Path], str]:
    """Two stages: the student samples, then the teachers. Returns configuration, run, models and what was printed."""
    folder = tmp_path_factory.mktemp("teachers")
    models = {"math": make_tiny_model(folder / "a", seed=1), "code": make_tiny_model(folder / "b", seed=2)}
    path = write_run(folder, tiny_model, "float32")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    routed = [row | {"teacher": ROUTES[i % 3]} for i, row in enumerate(rows)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in routed))
    asked = [row | {"answer": row["demonstration"]} for row in routed[:4]]
    (folder / "routed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    data, (plain,) = config.pop("data"), config["evaluation"]["sets"]
    config["evaluation"]["sets"] = [plain, plain | {"name": "routed", "file": "routed.jsonl"}]
    del config["training"]["steps"]
    config["teacher"] = {"weights": "external", "models": {name: str(model) for name, model in models.items()}}
    divergence = {"type": "forward", "top_k": 16}
    methods = [{"type": kind, "skip_first": 0, "divergence": divergence} for kind in ("sdft", "off_policy")]
    config["stages"] = [{"name": m["type"], "data": data, "steps": EACH, "method": m} for m in methods]
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(command(path, folder / "run"), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return path, folder / "run", models, done.stdout


@pytest.mark.parametrize("number", [0, 1])
def test_the_scores_are_those_of_the_teacher_that_the_row_names(
    run: tuple[Path, Path, dict[str, Path], str], number: int
) -> None:
    """In each step of a stage: the teachers keep their weights. In the second stage they also sample."""
    path, run_dir, folders, _ = run
    stage = prepare(load_config(path), path).stages[number]
    models = {n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for n, f in folders.items()}
    steps = range(number * EACH + 1, (number + 1) * EACH + 1)
    sequences = [sequence for step in steps for sequence in read_batch(run_dir, step)]
    assert {ROUTES[sequence.sample.record % 3] for sequence in sequences} == set(folders)
    for sequence in sequences:
        assert sequence.teacher is not None
        pair, (completion,) = stage.prompts[sequence.sample.record], sequence.completions
        assert pair.teacher_ids is not None
        assert pair.route == ROUTES[sequence.sample.record % 3]
        gaps = {}
        for name, model in models.items():
            rows = logprobs(model, pair.teacher_ids, completion, TOKENS)
            own = rows.gather(1, torch.tensor(completion).long()[:, None])[:, 0].numpy()
            gaps[name] = float(np.abs(own - sequence.teacher.sampled).max())
        assert gaps.pop(pair.route) < 1e-4
        assert min(gaps.values()) > 0.01


def test_the_run_evaluates_the_teachers_where_the_questions_name_them(
    run: tuple[Path, Path, dict[str, Path], str],
) -> None:
    _, run_dir, _, printed = run
    found = [(row.task, row.n) for row in read_rows(run_dir, EvalResult) if row.metric == TEACHER_ACCURACY]
    assert found == [("routed", 4)]
    assert "numbers (teacher) is not evaluated: 4 of its 4 rows have no column teacher" in printed
    assert set(json.loads((run_dir / "pids.json").read_text())) == {
        "student",
        "teacher-math",
        "teacher-code",
        "learner",
    }
    assert [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == list(range(1, 2 * EACH + 1))
