"""A small whole run that several tests share: its files, its command, its results."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sdft.services.records.rows import DETERMINISTIC_FIELDS, read_jsonl

STEPS = 6
LONG, STAGE = 28, 7  # steps of the reference run, and of each of its stages
STOPPED = "sdft: stopped; the same command resumes from the last checkpoint\n"
BIN = Path(sys.executable).parent  # folder of the sdft and ray commands
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}  # finds both commands by name


def write_run(folder: Path, model: Path, dtype: str, steps: int = STEPS, **learner: Any) -> Path:
    """Write a small run with data, evaluation and a checkpoint every two steps. learner: more keys of its section."""
    rows = [{"prompt": f"Say number {i}.", "demonstration": f"The number is {i}."} for i in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    questions = [r | {"answer": r["demonstration"]} for r in rows[:4]]
    (folder / "eval.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    config = {
        "model": str(model),
        "dtype": dtype,
        "data": {
            "train": "train.jsonl",
            "template": "turn",
            "max_prompt_tokens": 100,
            "max_teacher_prompt_tokens": 200,
        },
        "sampling": {"max_new_tokens": 12},
        "training": {"batch_size": 4, "steps": steps},
        "teacher": {"alpha": 0.2},
        "method": {"type": "sdft", "divergence": {"type": "forward", "top_k": 16}},
        "learner": {"optimizer": {"lr": 1e-3, "warmup_steps": 2}} | learner,
        "actors": {"student": {"kv_cache_gib": 0.05}, "teacher": {"kv_cache_gib": 0.05}},
        "evaluation": {"sets": [{"name": "numbers", "file": "eval.jsonl", "grader": "exact", "max_new_tokens": 8}]},
        "checkpoint": {"every": 2},
        "monitoring": {"record_rollouts": True},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def in_stages_of_pairs(config: Path, each: int) -> Path:
    """Rewrite a run into stages of `each` steps on the same data. The last stage may be shorter.

    The batches have half as many prompts with two rollouts each. A prompt is longer than a block of the prefix cache.
    """
    settings = yaml.safe_load(config.read_text())
    data, steps = settings.pop("data"), settings["training"].pop("steps")
    data["system"] = "Say the number that you are asked for. " * 2
    settings["training"]["batch_size"] //= 2
    settings["sampling"]["generations"] = 2
    settings["stages"] = [
        {"name": f"from-{first}", "data": data, "steps": min(each, steps - first)} for first in range(0, steps, each)
    ]
    config.write_text(yaml.safe_dump(settings))
    return config


def write_stages(folder: Path, model: Path, dtype: str = "float32") -> Path:
    """Write a run of two stages of two steps each, with evaluation sets per stage and a retention set."""
    path = write_run(folder, model, dtype)
    config = yaml.safe_load(path.read_text())
    data, (own,) = config.pop("data"), config["evaluation"].pop("sets")
    del config["training"]["steps"]
    config["evaluation"]["sets"] = [own | {"name": "kept", "role": "retention"}]
    config["stages"] = [
        {"name": "one", "data": data, "steps": 2, "sets": [own]},
        {"name": "two", "data": data | {"template": "paper"}, "steps": 2, "sets": [own | {"name": "again"}]},
    ]
    path.write_text(yaml.safe_dump(config))
    return path


def command(config: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Return the words of `sdft train`. overrides: as for --set."""
    settings = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, "-m", "sdft.services.cli", "train", str(config), "--run-dir", str(run_dir), *settings]


def finish(config: Path, run_dir: Path, *overrides: str) -> None:
    """Run `sdft train` to its end."""
    result = subprocess.run(
        command(config, run_dir, *overrides), capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, driver: subprocess.Popen | None = None) -> None:
    """Wait up to 300 s for the condition. Fails if the driver ends first."""
    deadline = time.monotonic() + 300
    while not condition():
        assert driver is None or driver.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"waited 300 s until {what}"
        time.sleep(0.02)


def wait_for_step(step: int, run_dir: Path, driver: subprocess.Popen | None = None) -> None:
    def reached() -> bool:
        return any(row["step"] >= step for row in read_jsonl(run_dir / "metrics.jsonl"))

    wait_until(reached, f"step {step} was reached", driver)


def replayed(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `sdft replay`."""
    words = [sys.executable, "-m", "sdft.services.cli", "replay", str(run_dir), *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def metrics(run_dir: Path) -> list[dict[str, object]]:
    return [{k: row[k] for k in DETERMINISTIC_FIELDS} for row in read_jsonl(run_dir / "metrics.jsonl")]
