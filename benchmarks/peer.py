"""A whole training step, sampling included, against TRL's SDFTTrainer: same model, prompts, batch and lengths.

    python -m benchmarks.peer [--dtype bfloat16 ...]

SmolLM2-135M, 32 prompts a step, at most 128 new tokens, EMA teacher, top 64 and tail, forward KL, first three tokens
left out. TRL has no vLLM on a CPU and samples with transformers. Each is given every core. Medians of the steps after
the first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import report
from services.metrics import read_jsonl
from services.models import resolve_model

HERE = Path(__file__).parent
TRL = HERE / "trl" / ".venv" / "bin" / "python"
BATCH, STEPS, NEW_TOKENS, K, SKIP = 32, 5, 128, 64, 3
PLACES = ["Zorvania", "Quelthar", "Mirrowen", "Ostrava", "Pellucid", "Drennor", "Valtis", "Hestia", "Corvane", "Ylthar"]


def rows() -> list[dict[str, str]]:
    """Prompts that a small model answers at some length."""
    made = []
    for i in range(BATCH * STEPS):
        place = f"{PLACES[i % len(PLACES)]} number {i}"
        prompt = f"What is the capital of {place} and why was it chosen? Answer in a few sentences."
        demonstration = (
            f"The capital of {place} is Karth-{i}, chosen because it lies at the mouth of the river Ombra and was the "
            "seat of the old kings."
        )
        made.append({"prompt": prompt, "demonstration": demonstration})
    return made


def ours(folder: Path, model: Path, dtype: str) -> list[dict[str, float]]:
    """Steps of `sdft train`, as a user runs it."""
    (folder / "teacher.jinja").write_text("{{ prompt }}\n\n{{ demonstration }}")  # TRL's default
    config: dict[str, Any] = {
        "model": str(model),
        "dtype": dtype,
        "data": {"train": "rows.jsonl", "template": "teacher.jinja"},
        "sampling": {"max_new_tokens": NEW_TOKENS},
        "training": {"batch_size": BATCH, "steps": STEPS},
        "teacher": {"weights": "ema", "alpha": 0.01},
        "loss": {"top_k": K, "skip_first": SKIP},
        "learner": {"optimizer": {"lr": 1e-5, "warmup_steps": 0, "schedule": "constant"}},
    }
    (folder / "ours.yaml").write_text(yaml.safe_dump(config))
    run_dir = folder / f"ours-{dtype}"
    command = [sys.executable, "-m", "services.cli", "train", str(folder / "ours.yaml"), "--run-dir", str(run_dir)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=3600)
    return [
        {"seconds": r["time_step_s"], "new_tokens": r["completion_tokens"] / r["samples"], "loss": r["loss"]}
        for r in read_jsonl(run_dir / "metrics.jsonl")
    ]


def trl(folder: Path, model: Path, dtype: str) -> list[dict[str, float]]:
    """Steps of TRL's trainer."""
    arguments = {
        "model": model,
        "rows": folder / "rows.jsonl",
        "dtype": dtype,
        "batch": BATCH,
        "steps": STEPS,
        "max-new-tokens": NEW_TOKENS,
        "top-k": K,
        "skip": SKIP,
        "threads": len(os.sched_getaffinity(0)),
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    command = [str(TRL), str(HERE / "trl" / "step.py"), *words]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=3600).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"seconds"')]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    dtypes = parser.parse_args().dtype
    model = resolve_model("smollm2-135m", Path.cwd())
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
        for dtype in dtypes:
            for run in (ours, trl):
                steps = run(folder, model, dtype)
                warm = steps[1:]
                seconds = statistics.median(step["seconds"] for step in warm)
                table.append(
                    {
                        "trainer": run.__name__,
                        "dtype": dtype,
                        "s a step": seconds,
                        "samples/s": BATCH / seconds,
                        "new tokens": statistics.mean(step["new_tokens"] for step in warm),
                        "first loss": steps[0]["loss"],
                    }
                )
    best = max(row["samples/s"] for row in table if row["trainer"] == "trl")
    for row in table:
        row["x best TRL"] = row["samples/s"] / best
    report("peer", f"A whole step of {BATCH} prompts, at most {NEW_TOKENS} new tokens", table)


if __name__ == "__main__":
    main()
