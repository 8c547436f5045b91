"""Whole steps of `sdft train`: the strict algorithm, and rollouts made one step ahead.

    python -m benchmarks.gpu.training [--device cuda] [--shape 1.5b] [--gpus 1] [--transport ipc]

A step has 32 prompts of about 384 tokens and 512 new tokens each, K = 64; with --device cpu four short ones. On one GPU
the learner has 0.4 of it and each engine 0.3. With two the learner has one and the engines share the other. Figures are
medians of the steps between the second and the last.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu.sizes import SIZES, shape_parser
from benchmarks.measure import in_a_process, report
from benchmarks.shapes import random_model
from sdft.services.config.dtype import native_dtype
from sdft.services.records.rows import read_jsonl

STEPS, WARM = 7, 2
MODES = {"strict": 0, "one step ahead": 1}
FIELDS = ("step", "rollout", "score", "learn", "sync", "wait")
FILLER = "The capital of Zorvania number {} lies at the mouth of the river Ombra and was the seat of the old kings. "


def rows(device: str) -> list[dict[str, str]]:
    """Return prompts and demonstrations, each prompt of about the tokens that are wanted. No two are equal."""
    size = SIZES[device]
    made = []
    for i in range(size.sequences * (STEPS + 2)):
        sentences = [FILLER.format(31 * i + j) for j in range(max(1, size.prompt // 32))]
        shown = max(1, (size.teacher_prompt - size.prompt) // 32)
        prompt = f"Question {i}: {''.join(sentences)}Why was it chosen? Answer at length."
        made.append({"prompt": prompt, "demonstration": "".join(FILLER.format(17 * i + j) for j in range(shown))})
    return made


def on_gpus(learner: dict[str, Any], gpus: int, cache_gib: float, transport: str) -> dict[str, Any]:
    """Return the sections that place a run with these settings of the learner on one GPU, or on two."""
    shares = (0.4, 0.3) if gpus == 1 else (1, 0.5)
    return {
        "learner": learner | {"gpus": shares[0]},
        "actors": {role: {"gpus": shares[1], "kv_cache_gib": cache_gib} for role in ("student", "teacher")},
        "weights": {"transport": transport},
    }


def configuration(model: Path, device: str, gpus: int, transport: str, staleness: int) -> dict[str, Any]:
    """Return the configuration of a run."""
    size = SIZES[device]
    base: dict[str, Any] = {
        "model": str(model),
        "device": device,
        "dtype": native_dtype(device),
        "data": {"train": "rows.jsonl", "template": "turn"},
        "sampling": {"max_new_tokens": size.new_tokens},
        "training": {"batch_size": size.sequences, "steps": STEPS, "max_staleness": staleness},
        "method": {"type": "sdft", "divergence": {"type": "forward", "top_k": size.k}},
        "learner": {"optimizer": {"lr": 1e-5, "warmup_steps": 0, "schedule": "constant"}},
        "monitoring": {"tensorboard": False},
    }
    return base | on_gpus(base["learner"], gpus, size.cache_gib, transport)


def steps(folder: Path, name: str, config: dict[str, Any]) -> list[dict[str, float]]:
    """Run, as a user does, and return the figures of the warm steps."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    words = ["train", str(folder / f"{name}.yaml"), "--run-dir", str(folder / name)]
    subprocess.run([sys.executable, "-m", "sdft.services.cli", *words], check=True, timeout=3600)
    return list(read_jsonl(folder / name / "metrics.jsonl"))[WARM:-1]


def main() -> None:
    parser = shape_parser(__doc__ or "")
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1)
    parser.add_argument("--transport", choices=("memory", "broadcast", "ipc"), help="as weights.transport")
    given = parser.parse_args()
    transport = given.transport or ("ipc" if given.device == "cuda" else "memory")
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(given.device)))
        model = in_a_process(partial(random_model, given.shape, folder, given.device))
        for name, staleness in MODES.items():
            config = configuration(model, given.device, given.gpus, transport, staleness)
            found = steps(folder, name.replace(" ", "-"), config)
            times = {f"{n} s": statistics.median(row[f"time_{n}_s"] for row in found) for n in FIELDS}
            table.append({"mode": name, **times})
    for row in table:
        row["strict, x this"] = table[0]["step s"] / row["step s"]
        row["sync and wait, of the step"] = (row["sync s"] + row["wait s"]) / row["step s"]
    title = f"{SIZES[given.device].sequences} prompts, {given.shape}, on {given.gpus} x {given.device}, {transport}"
    report(f"gpu_training_{given.shape}_{given.gpus}", title, table)


if __name__ == "__main__":
    main()
