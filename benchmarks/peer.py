"""Time of a whole training step, sampling included, against TRL's SDFTTrainer: same model, prompts, batch, lengths.

    python -m benchmarks.peer [--dtype bfloat16 ...]

The setting is SmolLM2-135M, 32 prompts per step, at most 128 new tokens, EMA teacher, top 64 and tail, forward KL,
without the first three tokens. TRL has no vLLM on a CPU and samples with transformers. Our engines are compiled
(execution: compiled), which adds 45 s to the start. With dtype bfloat16 our weights are bfloat16 with float32 masters.
TRL's weights are float32, its default, and are cast for each operation (with bfloat16 weights its first step took
277 s, on a machine with other work). Each trainer uses every core. Figures are medians of the steps after the first.
The bound counts the floating-point operations of sampling, scoring and learning on the tokens of our steps, at the rate
of a large matrix product in the same dtype.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measure import matrix_rate, report
from benchmarks.operations import Operations
from sdft.services.config.dtype import native_dtype
from sdft.services.config.load import load_config
from sdft.services.planning.models import resolve_model
from sdft.services.planning.prepare import prepare
from sdft.services.records.rows import read_jsonl

HERE = Path(__file__).parent
TRL = HERE / "trl" / ".venv" / "bin" / "python"
BATCH, STEPS, NEW_TOKENS, K, SKIP = 32, 5, 128, 64, 3
PLACES = ["Zorvania", "Quelthar", "Mirrowen", "Ostrava", "Pellucid", "Drennor", "Valtis", "Hestia", "Corvane", "Ylthar"]


def rows() -> list[dict[str, str]]:
    """Prompts to which a small model replies at some length, with demonstrations."""
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
    """Figures of each step of `sdft train`, started as a user starts it."""
    (folder / "teacher.jinja").write_text("{{ prompt }}\n\n{{ demonstration }}")  # TRL's default
    config: dict[str, Any] = {
        "model": str(model),
        "dtype": dtype,
        "data": {"train": "rows.jsonl", "template": "teacher.jinja"},
        "sampling": {"max_new_tokens": NEW_TOKENS},
        "training": {"batch_size": BATCH, "steps": STEPS},
        "actors": {"student": {"execution": "compiled"}, "teacher": {"execution": "compiled"}},
        "teacher": {"weights": "ema", "alpha": 0.01},
        "method": {"type": "sdft", "divergence": {"type": "forward", "top_k": K}, "skip_first": SKIP},
        "learner": {"optimizer": {"lr": 1e-5, "warmup_steps": 0, "schedule": "constant"}},
    }
    (folder / "ours.yaml").write_text(yaml.safe_dump(config))
    run_dir = folder / f"ours-{dtype}"
    command = [sys.executable, "-m", "sdft.services.cli", "train", str(folder / "ours.yaml"), "--run-dir", str(run_dir)]
    rates = [matrix_rate(getattr(torch, dtype))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=3600)
    rates.append(matrix_rate(getattr(torch, dtype)))
    rate = statistics.mean(rates)  # the rate drifts by 10 % and more within minutes
    prepared = prepare(load_config(folder / "ours.yaml"), folder / "ours.yaml")
    steps = []
    for r in read_jsonl(run_dir / "metrics.jsonl"):
        members = [prepared.stages[0].prompts[s.record] for s in prepared.schedule.batch(r["step"])]
        scored = sum(len(p.teacher_ids) for p in members if p.teacher_ids is not None) + r["completion_tokens"]
        work = operations(model, r["prompt_tokens"] + r["completion_tokens"], scored, r["completion_tokens"])
        new_tokens = r["completion_tokens"] / r["samples"]
        steps.append({"seconds": r["time_step_s"], "new_tokens": new_tokens, "loss": r["loss"], "bound": work / rate})
    return steps


def operations(model: Path, trained: int, scored: int, completed: int) -> float:
    """Operations of a step: sampling and learning on `trained` tokens, scoring on `scored`, heads on `completed`."""
    o = Operations.of(model)
    sampling = o.forward(trained, trained / BATCH, completed)
    scoring = o.forward(scored, scored / BATCH, completed)
    return sampling + scoring + o.train(trained, trained / BATCH, completed)


def trl(folder: Path, model: Path, dtype: str) -> list[dict[str, float]]:
    """Figures of each step of TRL's trainer."""
    output = in_trl("step", model, folder, dtype=dtype, batch=BATCH, steps=STEPS)
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"seconds"')]


def in_trl(module: str, model: Path, folder: Path, **arguments: object) -> str:
    """Run a module of benchmarks/trl in the virtual environment of TRL and return its standard output."""
    cores = len(os.sched_getaffinity(0))
    shape = {"max-new-tokens": NEW_TOKENS, "top-k": K, "skip": SKIP, "threads": cores}
    given = {"model": model, "rows": folder / "rows.jsonl"} | shape | arguments
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [str(TRL), "-m", f"benchmarks.trl.{module}", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=3600, cwd=HERE.parent).stdout


def same_loss(folder: Path, model: Path) -> None:
    """Report the loss of the first step by TRL and by our learner on the same rollouts."""
    output = in_trl("same_loss", model, folder, dtype="float32", batch=8, steps=1)
    pairs = json.loads(next(line for line in output.splitlines() if line.startswith('{"whole')))
    rows = [{"support": n, "TRL": t, "ours": o, "difference": abs(t - o) / o} for n, (t, o) in pairs.items()]
    report("peer_loss", "Loss of a first step on the same 8 rollouts, forward KL, float32", rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    default = list(dict.fromkeys(["float32", native_dtype("cpu")]))  # without native bfloat16 that dtype may take hours
    parser.add_argument("--dtype", nargs="+", default=default)
    dtypes = parser.parse_args().dtype
    model = resolve_model("smollm2-135m", Path.cwd())
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
        same_loss(folder, model)
        for dtype in dtypes:
            for run in (ours, trl):
                steps = run(folder, model, dtype)
                warm = steps[1:]
                seconds = statistics.median(step["seconds"] for step in warm)
                table.append(
                    {
                        "trainer": run.__name__,
                        "dtype": dtype,
                        "s per step": seconds,
                        "samples/s": BATCH / seconds,
                        "new tokens": statistics.mean(step["new_tokens"] for step in warm),
                        "first loss": steps[0]["loss"],
                        "x bound": seconds / statistics.median(step["bound"] for step in warm)
                        if "bound" in warm[0]
                        else math.nan,
                    }
                )
    best = max(row["samples/s"] for row in table if row["trainer"] == "trl")
    for row in table:
        row["x best TRL"] = row["samples/s"] / best
    report("peer", f"A whole step of {BATCH} prompts, at most {NEW_TOKENS} new tokens", table)


if __name__ == "__main__":
    main()
