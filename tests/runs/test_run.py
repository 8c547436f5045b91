"""Whole runs of `sdft train` with real Ray, vLLM and DeepSpeed on the tiny model. chaos/ kills their processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import TeacherScores
from sdft.services.analysis.matrix import read_matrix
from sdft.services.analysis.status import status_text
from sdft.services.cli.main import main
from sdft.services.cli.train import train
from sdft.services.config.load import load_config
from sdft.services.planning.prepare import prepare
from sdft.services.records.batches import read_batch, write_batch
from sdft.services.records.rows import read_jsonl
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS
from tests.runs.leftovers import new_since, on_machine
from tests.runs.run import ENVIRONMENT, LONG, STEPS, STOPPED, command, finish, metrics, replayed, wait_for_step


@pytest.fixture(scope="module", autouse=True)
def machine_before() -> set[str]:
    return on_machine()


def test_a_run_learns_accounts_for_every_sample_and_leaves_its_files(undisturbed: tuple[Path, Path]) -> None:
    _, run_dir = undisturbed
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, LONG + 1))
    assert [r["trained"] for r in rows] == [4 * s for s in range(1, LONG + 1)]
    assert all(r["dropped"] == 0 and r["in_flight"] == 0 and r["staleness_max"] == 0 for r in rows)
    assert rows[0]["divergence"] > 0
    assert [r["student_version"] for r in rows] == list(range(LONG))
    assert {r["metric"] for r in read_jsonl(run_dir / "eval.jsonl")} == {"accuracy", "teacher_accuracy"}
    assert "<svg" in (run_dir / "report.html").read_text()
    manifest = json.loads((run_dir / "checkpoints" / f"step-{LONG:06d}" / "manifest.json").read_text())
    assert "student/model.safetensors" in manifest["files"]
    assert json.loads((run_dir / "run.json").read_text())["state"] == "finished"
    umask = os.umask(0o022)
    os.umask(umask)
    modes = {path: path.stat().st_mode & 0o777 for path in run_dir.rglob("*")}
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}
    # `sdft status` says for a stopped run that its own configuration continues it.
    assert main(["train", str(run_dir / "config.yaml"), "--run-dir", str(run_dir)]) == 0
    assert read_jsonl(run_dir / "metrics.jsonl") == rows


def test_rollouts_go_on_while_the_learner_steps_and_are_never_too_old(undisturbed: tuple[Path, Path]) -> None:
    """The run is killed in its second stage and continued: every sample is trained once, and none begins before its
    stage.

    Its first batch equals that of the strict run except for rounding: the engines compute batches of other shapes, and
    on some processors (with AMX) the shape changes the last bits.
    """
    _, whole = undisturbed
    settings = yaml.safe_load(undisturbed[0].read_text())
    settings["stages"] = [one | {"steps": 3} for one in settings["stages"][:2]]
    config, run_dir = undisturbed[0].with_name("ahead.yaml"), undisturbed[0].with_name("ahead")
    config.write_text(yaml.safe_dump(settings))
    with run_dir.with_suffix(".log").open("wb") as log:
        driver = subprocess.Popen(command(config, run_dir, "training.max_staleness=2"), stdout=log, stderr=log)
        wait_for_step(4, run_dir, driver)
        driver.kill()
        driver.wait()
    finish(config, run_dir, "training.max_staleness=2")
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [(step, int(step > 3)) for step in range(1, 7)]
    assert [row["trained"] for row in rows] == [4 * step for step in range(1, STEPS + 1)]
    assert 1 <= max(row["staleness_max"] for row in rows) <= 2
    assert [row["in_flight"] for row in rows] == [8, 4, 0, 8, 4, 0]
    assert all(row["dropped"] == 0 for row in rows)
    ahead, strict = ({s.sample: s for s in read_batch(folder, 1)} for folder in (run_dir, whole))
    assert ahead.keys() == strict.keys()
    # If rounding exceeds the difference of two tokens' probabilities, another token is sampled, and all later ones
    # differ.
    same = [s for s in ahead if np.array_equal(ahead[s].token_ids, strict[s].token_ids)]
    assert len(same) >= len(ahead) / 2
    for sample in same:
        np.testing.assert_allclose(taught(ahead[sample]).sampled, taught(strict[sample]).sampled, atol=0.1)
    # At the start of a stage the teacher equals the student: the first loss comes only from the difference of the
    # prompts.
    assert rows[3]["teacher_version"] == 3


def test_a_run_killed_after_its_last_step_is_finished_by_the_next_start(undisturbed: tuple[Path, Path]) -> None:
    config, run_dir = undisturbed
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(record | {"state": "failed", "error": "stopped by a signal"}))
    train(prepare(load_config(config), config), run_dir, "auto", Console(quiet=True))
    assert json.loads((run_dir / "run.json").read_text()) == record
    assert "state       finished" in status_text(run_dir)


@pytest.mark.whole
def test_a_replay_finds_a_changed_number(undisturbed: tuple[Path, Path]) -> None:
    """The steps before it have the same state to the last bit. test_job replays a run without a difference."""
    _, whole = undisturbed
    spoiled = whole.parent / "spoiled"
    shutil.copytree(whole, spoiled)
    samples = read_batch(spoiled, LONG)
    taught(samples[0]).logprobs[-1] -= 0.01
    write_batch(spoiled, LONG, samples)
    result = replayed(spoiled)
    assert result.returncode == 1, result.stderr[-3000:]
    assert f"step {LONG - 2}: the same to the last bit of its state" in result.stdout
    assert f"step {LONG}: loss was" in result.stdout


def test_a_live_teacher_and_two_learner_ranks_train_until_a_signal(undisturbed: tuple[Path, Path]) -> None:
    """Without teacher engines the student engines score. At the first step, live weights equal the EMA: so does the
    divergence.

    The signal is for every process of the run's group, as from a terminal. test_stop has signals at the start and to
    each process below the driver, test_elastic one to the driver alone.
    """
    config, whole = undisturbed
    before, run_dir = on_machine(), config.parent / "live"
    words = command(config, run_dir, "teacher.weights=live", "learner.ranks=2", "learner.zero_stage=3")
    driver = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_step(2, run_dir, driver)
    began = time.monotonic()
    os.killpg(driver.pid, signal.SIGTERM)
    _, errors = driver.communicate(timeout=90)
    assert time.monotonic() - began < 30
    assert driver.returncode == 130
    assert errors == STOPPED
    assert json.loads((run_dir / "run.json").read_text())["error"] == "stopped by a signal"
    live, ema = (read_jsonl(folder / "metrics.jsonl") for folder in (run_dir, whole))
    assert {row["samples"] for row in live} == {4}
    assert live[0]["divergence"] == pytest.approx(ema[0]["divergence"], rel=1e-2)
    assert set(json.loads((run_dir / "pids.json").read_text())) == {"student", "learner"}
    assert new_since(before) == set()


@pytest.fixture(scope="module")
def stream(undisturbed: tuple[Path, Path], tiny_model: Path) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """Configuration, run directory and exit of an SFT run with an appended stage of off-policy distillation.

    Its retention set asks for what the base model says; the accuracy falls, and the retention guard stops the run.
    """
    config = undisturbed[0].with_name("stream.yaml")
    run_dir, stage = config.with_name("stream"), config.with_name("stage.yaml")
    settings = yaml.safe_load(undisturbed[0].read_text())
    tokenizer, prompt = AutoTokenizer.from_pretrained(tiny_model), "Play a song."
    message = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rows = list(range(TOKENS, model.config.vocab_size))  # are no tokens
    reply = model.generate(ids, do_sample=False, max_new_tokens=8, suppress_tokens=rows)[0, ids.shape[1] :]
    said = tokenizer.decode(reply)
    config.with_name("said.jsonl").write_text(json.dumps({"prompt": prompt, "answer": said}) + "\n")
    kept = {"name": "kept", "file": "said.jsonl", "grader": "exact", "role": "retention", "max_new_tokens": 8}
    texts = [{"text": "Say number 1. The number is 1."}, {"text": "The capital is a number."}]
    config.with_name("prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    settings["evaluation"]["sets"] += [kept, {"name": "prose", "file": "prose.jsonl", "grader": "perplexity"}]
    settings["data"] = settings.pop("stages")[0]["data"]
    del settings["data"]["system"]
    settings |= {"method": "sft", "dtype": "float32", "teacher": {"weights": "base"}, "retention": {"max_drop": 0.5}}
    settings["training"] = {"batch_size": 4, "steps": STEPS}
    settings["sampling"] = {"max_new_tokens": 40}
    config.write_text(yaml.safe_dump(settings))
    finish(config, run_dir)
    second = {"name": "second", "data": settings["data"], "steps": 2, "method": "off_policy"}
    stage.write_text(yaml.safe_dump(second | {"sampling": {"max_new_tokens": 12}, "optimizer": {"lr": 1e-3}}))
    words = [*command(config, run_dir, "retention.action=stop"), "--append", str(stage)]
    return config, run_dir, subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)


def taught(sequence: TrainingSequence) -> TeacherScores:
    """Return the teacher's scores of a sequence that has them."""
    assert sequence.teacher is not None
    return sequence.teacher


Stream = tuple[Path, Path, "subprocess.CompletedProcess[str]"]


def test_sft_trains_on_the_demonstrations_own_tokens(stream: Stream, tiny_model: Path) -> None:
    """The first loss is that of Hugging Face: the mean over the batch of a demonstration's mean cross-entropy."""
    _, run_dir, _ = stream
    rows = read_jsonl(run_dir / "metrics.jsonl")[:STEPS]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    losses = []
    for sample in read_batch(run_dir, 1):
        assert f"The number is {sample.sample.record}." in AutoTokenizer.from_pretrained(tiny_model).decode(
            sample.completions[0]
        )
        own = torch.tensor(sample.completions[0]).long()[:, None]
        losses.append(-logprobs(model, sample.prompt_ids, sample.completions[0], TOKENS).gather(1, own).mean())
    assert rows[0]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert [row["trained"] for row in rows] == [4 * step for step in range(1, STEPS + 1)]
    assert {row["mismatch_kl"] for row in rows} == {None}


def test_off_policy_trains_on_what_the_teacher_samples(stream: Stream, tiny_model: Path) -> None:
    """The completions follow the student's prompt and are scored in the teacher's prompt.

    The scores are Hugging Face's log-probs of the base model: with `teacher.weights: base` it is the teacher in all
    stages.
    """
    config, run_dir, _ = stream
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompts = prepare(load_config(config), config).stages[0].prompts
    for sample in read_batch(run_dir, STEPS + 1):
        pair, completion = prompts[sample.sample.record], sample.completions[0]
        assert sample.prompt_ids.tolist() == pair.student_ids.tolist()
        assert pair.teacher_ids is not None
        rows = logprobs(model, pair.teacher_ids, completion, TOKENS)
        own = rows.gather(1, torch.tensor(completion).long()[:, None])[:, 0]
        np.testing.assert_allclose(taught(sample).sampled, own[sample.loss_mask[-len(own) :]], atol=1e-4)
    rows = read_jsonl(run_dir / "metrics.jsonl")[STEPS:]
    assert [row["direction"] for row in rows] == ["forward"] * 2
    assert {row["mismatch_kl"] for row in rows} == {None}


def test_a_stage_is_appended_to_a_finished_run_and_accounted_for_by_itself(stream: Stream) -> None:
    """Existing rows stay. The next stage begins with the final learner state of the run, to the last bit."""
    _, run_dir, _ = stream
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [(row["step"], row["stage"], row["trained"]) for row in rows] == [
        (step, int(step > STEPS), 4 * step) for step in range(1, STEPS + 3)
    ]
    matrix = read_matrix(run_dir)
    assert matrix.stages == ("stream", "second")
    assert (matrix.tasks, matrix.retention) == (("stream",), ("kept",))
    assert len(matrix.rows) == 3
    assert "<svg" in (run_dir / "report.html").read_text()
    result = replayed(run_dir, "--steps", f"{STEPS + 1}:")
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert f"step {STEPS + 2}: the same to the last bit of its state" in result.stdout


def test_the_perplexity_of_texts_is_hugging_faces(stream: Stream, tiny_model: Path) -> None:
    config, run_dir, _ = stream
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    texts = [
        np.asarray(tokenizer(row["text"]).input_ids) for row in map(json.loads, config.with_name("prose.jsonl").open())
    ]
    own = [logprobs(model, ids[:1], ids[1:], TOKENS).gather(1, torch.tensor(ids[1:])[:, None]) for ids in texts]
    rows = [row for row in read_jsonl(run_dir / "eval.jsonl") if row["metric"] == "perplexity"]
    assert [(row["step"], row["task"]) for row in rows] == [(step, "prose") for step in (0, STEPS, STEPS + 2)]
    assert {row["n"] for row in rows} == {sum(map(len, own))}
    assert rows[0]["value"] == pytest.approx(float(torch.cat(own).mean().neg().exp()), rel=1e-4)
    assert rows[1]["value"] != rows[0]["value"]


def test_the_retention_guard_ends_a_run_whose_guarded_set_falls(stream: Stream) -> None:
    """The action in the first stage is to warn: the run only prints a warning."""
    _, run_dir, ended = stream
    assert ended.returncode == 4, ended.stdout[-2000:] + ended.stderr[-4000:]
    assert "kept fell from 100 % to 0.0 % (n 1)" in ended.stderr.splitlines()[-1]
    assert json.loads((run_dir / "run.json").read_text())["state"] == "guarded"
    assert "ended by its retention guard" in status_text(run_dir)
    assert (run_dir / f"retention-step-{STEPS:06d}.jsonl").exists()
    assert (run_dir / "checkpoints" / f"step-{STEPS + 2:06d}" / "manifest.json").exists()


def test_nothing_is_left_behind(machine_before: set[str], stream: Stream) -> None:
    """After whole runs, a kill and a stop: no process, no shared memory, no temporary file."""
    assert new_since(machine_before) == set()


@pytest.mark.whole
def test_a_users_own_transport_delivers_the_same_bits_and_its_damaged_file_is_found(
    undisturbed: tuple[Path, Path],
) -> None:
    config, whole = undisturbed
    run_dir, weights = config.parent / "files", config.parent / "weights"
    weights.mkdir()
    quick = ("evaluation.sets=[]", "checkpoint.every=50", "monitoring.tensorboard=false")
    words = command(config, run_dir, "weights.transport=tests.fakes.damaged_files:DamagingTransport", *quick)
    environment = ENVIRONMENT | {"WEIGHTS_FOLDER": str(weights)}
    with run_dir.with_suffix(".log").open("w+b") as log:
        driver = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        wait_for_step(2, run_dir, driver)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(90) == 130
        log.seek(0)
        said = " ".join(log.read().decode().split())
    assert re.search(r"student weights v1: \S+ arrived damaged: .*; the snapshot is published again", said), said
    assert metrics(run_dir)[:2] == metrics(whole)[:2]
    assert {file.name.split("-")[0] for file in weights.iterdir()} == {"student", "teacher"}
