"""A gated teacher in real runs: refreshed, killed and resumed to the same bits, replayed, and refused.

test_gated of the training has which refreshes are due, and resumes, in simulated time; test_refresh of the learner what
one is, and that checkpoints keep it.
"""

import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sdft.actors.shared.sequences import TrainingSequence
from sdft.learner.checkpoint.state import StateFiles, first_difference
from sdft.services.analysis.status import status_text
from sdft.services.config.load import load_config
from sdft.services.planning.prepare import prepare
from sdft.services.records.batches import read_batch
from sdft.services.records.checkpoints import folder_of
from sdft.services.records.rows import read_jsonl
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS
from tests.runs.run import command, finish, metrics, replayed, wait_for_step, write_run

STEPS, EVERY = 9, 4  # refreshed after steps 4 and 8
SETTINGS: dict[str, Any] = {
    "teacher": {"weights": "gated", "refresh_every": EVERY},
    "evaluation": {},
    "checkpoint": {"every": 2, "keep": 100},
}
WIDE = {"window": 1, "length": 100.0, "length_tail": 100.0, "entropy": 1000.0, "divergence": 1000.0}
NARROW = WIDE | {"entropy": 1.0000001}  # any change refuses


def configured(folder: Path, model: Path, detectors: dict[str, Any]) -> Path:
    path = write_run(folder, model, "float32", steps=STEPS)
    settings = yaml.safe_load(path.read_text()) | SETTINGS | {"retention": {"detectors": detectors}}
    settings["data"]["template"] = "paper"
    path.write_text(yaml.safe_dump(settings))
    return path


def events(run_dir: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["kind"]) for row in read_jsonl(run_dir / "events.jsonl")]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Configuration and run directory of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("gated")
    config = configured(folder, tiny_model, WIDE)
    finish(config, folder / "whole")
    return config, folder / "whole"


@pytest.mark.whole
def test_the_teacher_is_the_student_of_its_last_refresh(whole: tuple[Path, Path], tiny_model: Path) -> None:
    """In the learner's state, and in the engines: their scores are Hugging Face's log-probs with that student."""
    config, run_dir = whole
    assert events(run_dir) == [(EVERY, "refreshed"), (2 * EVERY, "refreshed")]
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["teacher_version"] for row in rows] == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert "teacher     refreshed 2 times, after step 4, 8" in status_text(run_dir)
    state = StateFiles(folder_of(run_dir, EVERY))
    names = [name.removeprefix("teacher/") for name in state.names if name.startswith("teacher/")]
    assert len(names) > 10
    for kind, same in (("master", True), ("exp_avg", False)):
        pairs = [(state.pieces(f"teacher/{name}")[0], state.pieces(f"{kind}/{name}")[0]) for name in names]
        assert all(torch.equal(a.values, b.values) for a, b in pairs) == same
    prompts = prepare(load_config(config), config).stages[0].prompts
    for step, folder in ((EVERY, tiny_model), (EVERY + 1, folder_of(run_dir, EVERY) / "student")):
        teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for sequence in read_batch(run_dir, step):
            shown, completion = prompts[sequence.sample.record].teacher_ids, sequence.completions[0]
            assert shown is not None
            assert sequence.teacher is not None
            rows = logprobs(teacher, shown, completion, TOKENS)
            own = rows.gather(1, torch.tensor(completion).long()[:, None])[:, 0]
            np.testing.assert_allclose(sequence.teacher.sampled, own[sequence.loss_mask[-len(own) :]], atol=1e-4)


@pytest.mark.whole
def test_the_figures_of_completions_are_those_of_the_recorded_batches(whole: tuple[Path, Path]) -> None:
    _, run_dir = whole
    for row in read_jsonl(run_dir / "metrics.jsonl"):
        batch = read_batch(run_dir, row["step"])
        texts, sure = [s.completions[0].tolist() for s in batch], np.concatenate([own_logprobs(s) for s in batch])
        grams = [[tuple(text[i : i + 3]) for i in range(len(text) - 2)] for text in texts]
        total, lengths = sum(map(len, grams)), sorted(map(len, texts))
        assert row["length_mean"] == sum(lengths) / len(lengths)
        assert row["length_tail"] == lengths[math.ceil(0.95 * len(lengths)) - 1]
        assert row["truncated"] == sum(s.finish_reason == "length" for s in batch) / len(batch)
        assert row["repeated"] == sum(len(of) - len(set(of)) for of in grams) / total
        assert row["distinct"] == len({gram for of in grams for gram in of}) / total
        assert row["entropy"] == pytest.approx(-float(sure.mean(dtype=np.float64)), rel=1e-9)
        assert row["leaks"] == row["thoughts"] == 0.0


def own_logprobs(sequence: TrainingSequence) -> np.ndarray:
    return sequence.logprobs[sequence.turns[0]]


@pytest.mark.whole
def test_a_run_that_is_killed_between_two_refreshes_ends_with_the_same_bits(whole: tuple[Path, Path]) -> None:
    """Also the version of its teacher, which it has from its events."""
    config, run_dir = whole
    killed = run_dir.with_name("killed")
    with killed.with_suffix(".log").open("wb") as log:
        driver = subprocess.Popen(command(config, killed), stdout=log, stderr=log)
        wait_for_step(6, killed, driver)
        driver.kill()
        driver.wait()
    finish(config, killed)
    assert metrics(killed) == metrics(run_dir)
    assert (killed / "events.jsonl").read_bytes() == (run_dir / "events.jsonl").read_bytes()
    assert first_difference(folder_of(run_dir, STEPS), folder_of(killed, STEPS)) is None


@pytest.mark.whole
def test_the_learner_alone_repeats_the_refreshes(whole: tuple[Path, Path]) -> None:
    result = replayed(whole[1], "--steps", "4:")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert f"step {STEPS}: the same to the last bit of its state" in result.stdout


@pytest.mark.whole
def test_a_refresh_that_a_detector_refuses_leaves_the_teacher_as_it_is(
    whole: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    config, run_dir = configured(tmp_path, tiny_model, NARROW), tmp_path / "run"
    finish(config, run_dir)
    decided = [(step, kind) for step, kind in events(run_dir) if kind != "drifted"]
    assert decided == [(EVERY, "refused"), (2 * EVERY, "refused")]
    # Up to the first refresh the runs are the same, and no longer.
    assert metrics(run_dir)[:EVERY] == metrics(whole[1])[:EVERY]
    assert metrics(run_dir)[EVERY]["divergence"] != metrics(whole[1])[EVERY]["divergence"]
    assert {row["teacher_version"] for row in read_jsonl(run_dir / "metrics.jsonl")} == {0}
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    last = StateFiles(folder_of(run_dir, STEPS))
    for name, parameter in base.named_parameters():
        assert torch.equal(last.whole(f"teacher/model.{name}", parameter.numel()), parameter.detach().view(-1))
    text = status_text(run_dir)
    assert "teacher     a refresh was refused 2 times; the last time after step 8: the entropy" in text
    assert "a refresh of the teacher was refused" in (run_dir / "report.html").read_text()
