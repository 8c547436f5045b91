"""Whole runs of `sdft train` with real Ray, vLLM and DeepSpeed on the tiny model, killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from services.metrics import DETERMINISTIC_FIELDS, read_jsonl

STEPS = 6


def write_run(folder: Path, model: Path) -> Path:
    """A small run with data, evaluation and a checkpoint every two steps."""
    rows = [{"prompt": f"Say number {i}.", "demonstration": f"The number is {i}."} for i in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    questions = [r | {"answer": r["demonstration"]} for r in rows[:4]]
    (folder / "eval.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    config = {
        "model": str(model),
        "dtype": "bfloat16",
        "data": {
            "train": "train.jsonl",
            "template": "turn",
            "max_prompt_tokens": 100,
            "max_teacher_prompt_tokens": 200,
        },
        "sampling": {"max_new_tokens": 12},
        "training": {"batch_size": 4, "steps": STEPS},
        "teacher": {"alpha": 0.2},
        "loss": {"top_k": 16},
        "learner": {"optimizer": {"lr": 1e-3, "warmup_steps": 2}},
        "evaluation": {"sets": [{"name": "numbers", "file": "eval.jsonl", "grader": "exact", "max_new_tokens": 8}]},
        "checkpoint": {"every": 2},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(config: Path, run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "services.cli", "train", str(config), "--run-dir", str(run_dir)]


def finish(config: Path, run_dir: Path) -> None:
    result = subprocess.run(command(config, run_dir), capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def kill_after(config: Path, run_dir: Path, step: int, victim: str) -> None:
    """Start the run, SIGKILL one of its processes once `step` is done, and wait for the run to end."""
    with (run_dir.parent / "killed.log").open("ab") as log:
        driver = subprocess.Popen(command(config, run_dir), stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not any(row["step"] >= step for row in read_jsonl(run_dir / "metrics.jsonl")):
            assert driver.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, f"step {step} was not reached in 300 s"
            time.sleep(0.05)
        pids = json.loads((run_dir / "pids.json").read_text())
        os.kill(driver.pid if victim == "driver" else pids[victim][0], signal.SIGKILL)
        assert driver.wait(timeout=120) != 0


def our_processes() -> list[str]:
    """Command lines of Ray and vLLM processes on this machine."""
    names = ("raylet", "gcs_server", "EngineWorker", "LearnerWorker", "EngineCore", "VLLM::")
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if any(name in line for name in names)]


def metrics(run_dir: Path) -> list[dict[str, object]]:
    return [{k: row[k] for k in DETERMINISTIC_FIELDS} for row in read_jsonl(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("run")
    config = write_run(folder, tiny_model)
    finish(config, folder / "whole")
    return config, folder / "whole"


def test_a_run_learns_accounts_for_every_sample_and_leaves_its_files(undisturbed: tuple[Path, Path]) -> None:
    _, run_dir = undisturbed
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    assert [r["trained"] for r in rows] == [4 * s for s in range(1, STEPS + 1)]
    assert all(r["dropped"] == 0 and r["in_flight"] == 0 and r["staleness_max"] == 0 for r in rows)
    assert rows[0]["divergence"] > 0
    assert [r["student_version"] for r in rows] == list(range(STEPS))
    assert {r["metric"] for r in read_jsonl(run_dir / "eval.jsonl")} == {"accuracy", "teacher_accuracy"}
    assert "<svg" in (run_dir / "report.html").read_text()
    manifest = json.loads((run_dir / "checkpoints" / "step-000006" / "manifest.json").read_text())
    assert "student/model.safetensors" in manifest["files"]
    assert json.loads((run_dir / "run.json").read_text())["state"] == "finished"


def test_a_run_killed_three_times_and_continued_is_the_run_that_was_never_killed(
    undisturbed: tuple[Path, Path],
) -> None:
    """SIGKILL to the driver before a checkpoint, to the learner, to an engine: same tokens, same losses."""
    config, whole = undisturbed
    run_dir = config.parent / "killed"
    kill_after(config, run_dir, 1, "driver")
    kill_after(config, run_dir, 3, "learner")
    kill_after(config, run_dir, 5, "teacher")
    finish(config, run_dir)
    assert metrics(run_dir) == metrics(whole)
    assert read_jsonl(run_dir / "eval.jsonl") == read_jsonl(whole / "eval.jsonl")
    assert read_jsonl(run_dir / "samples.jsonl") == read_jsonl(whole / "samples.jsonl")
    student = Path("checkpoints") / "step-000006" / "student" / "model.safetensors"
    assert (run_dir / student).read_bytes() == (whole / student).read_bytes()


def test_a_run_that_is_told_to_stop_says_so_and_what_to_do(undisturbed: tuple[Path, Path]) -> None:
    config, _ = undisturbed
    run_dir = config.parent / "stopped"
    driver = subprocess.Popen(command(config, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (run_dir / "pids.json").exists():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    driver.send_signal(signal.SIGTERM)
    _, stderr = driver.communicate(timeout=90)
    assert driver.returncode == 130
    assert "resumes from the last checkpoint" in stderr
    assert json.loads((run_dir / "run.json").read_text())["error"] == "stopped by a signal"


def test_nothing_is_left_running(undisturbed: tuple[Path, Path]) -> None:
    deadline = time.monotonic() + 20
    while (left := our_processes()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []
