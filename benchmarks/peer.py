"""Time of a whole training step, sampling included, against TRL's SDFTTrainer: same model, prompts, batch, lengths.

    python -m benchmarks.peer [--dtype bfloat16 ...]
    python -m benchmarks.peer --device cuda --shape 1.5b --trl PYTHON

The setting is SmolLM2-135M, 32 prompts per step, at most 128 new tokens, EMA teacher, top 64 and tail, forward KL,
without the first three tokens. TRL has no vLLM on a CPU and samples with transformers. Our engines are compiled
(execution: compiled), which adds 45 s to the start. With dtype bfloat16 our weights are bfloat16 with float32 masters.
TRL's weights are float32, its default, and are cast for each operation (with bfloat16 weights its first step took
277 s, on a machine with other work). Each trainer uses every core. Figures are medians of the steps after the first.
The bound counts the floating-point operations of sampling, scoring and learning on the tokens of our steps, at the rate
of a large matrix product in the same dtype.

On a GPU the model is random, of a shape, replies have at most 512 tokens, and both trainers share the GPU with vLLM:
TRL with its engine in the same process, ours as in benchmarks.gpu.training. PYTHON is an interpreter with TRL, vLLM and
torch for CUDA.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.sizes import SIZES
from benchmarks.gpu.training import on_gpus
from benchmarks.measure import device_parser, in_a_process, matrix_rate, report
from benchmarks.operations import Operations
from benchmarks.shapes import SHAPES, random_model
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


@dataclass(frozen=True)
class Setting:
    """What both trainers are given."""

    device: str
    model: Path
    trl: Path  # the interpreter that TRL is installed for

    @property
    def new_tokens(self) -> int:
        """Most tokens of a reply."""
        return NEW_TOKENS if self.device == "cpu" else SIZES[self.device].new_tokens


def ours(folder: Path, setting: Setting, dtype: str) -> list[dict[str, float]]:
    """Figures of each step of `sdft train`, started as a user starts it."""
    model = setting.model
    (folder / "teacher.jinja").write_text("{{ prompt }}\n\n{{ demonstration }}")  # TRL's default
    config: dict[str, Any] = {
        "model": str(model),
        "dtype": dtype,
        "data": {"train": "rows.jsonl", "template": "teacher.jinja"},
        "device": setting.device,
        "sampling": {"max_new_tokens": setting.new_tokens},
        "training": {"batch_size": BATCH, "steps": STEPS},
        "actors": {"student": {"execution": "compiled"}, "teacher": {"execution": "compiled"}},
        "teacher": {"weights": "ema", "alpha": 0.01},
        "method": {"type": "sdft", "divergence": {"type": "forward", "top_k": K}, "skip_first": SKIP},
        "learner": {"optimizer": {"lr": 1e-5, "warmup_steps": 0, "schedule": "constant"}},
    }
    if setting.device == "cuda":
        config |= on_gpus(config["learner"], 1, SIZES["cuda"].cache_gib, "ipc")
    (folder / "ours.yaml").write_text(yaml.safe_dump(config))
    run_dir = folder / f"ours-{dtype}"
    command = [sys.executable, "-m", "sdft.services.cli", "train", str(folder / "ours.yaml"), "--run-dir", str(run_dir)]
    rate_now = partial(in_a_process, partial(matrix_rate, getattr(torch, dtype), setting.device))
    rates = [rate_now()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=3600)
    rates.append(rate_now())
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


def trl(folder: Path, setting: Setting, dtype: str) -> list[dict[str, float]]:
    """Figures of each step of TRL's trainer."""
    output = in_trl("step", setting, folder, dtype=dtype, batch=BATCH, steps=STEPS, device=setting.device)
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"seconds"')]


def in_trl(module: str, setting: Setting, folder: Path, **arguments: object) -> str:
    """Run a module of benchmarks/trl in the virtual environment of TRL and return its standard output."""
    cores = len(os.sched_getaffinity(0))
    shape = {"max-new-tokens": setting.new_tokens, "top-k": K, "skip": SKIP, "threads": cores}
    given = {"model": setting.model, "rows": folder / "rows.jsonl"} | shape | arguments
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [str(setting.trl), "-m", f"benchmarks.trl.{module}", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=3600, cwd=HERE.parent).stdout


def same_loss(folder: Path, setting: Setting) -> None:
    """Report the loss of the first step by TRL and by our learner on the same rollouts."""
    output = in_trl("same_loss", setting, folder, dtype="float32", batch=8, steps=1)
    pairs = json.loads(next(line for line in output.splitlines() if line.startswith('{"whole')))
    rows = [{"support": n, "TRL": t, "ours": o, "difference": abs(t - o) / o} for n, (t, o) in pairs.items()]
    report("peer_loss", "Loss of a first step on the same 8 rollouts, forward KL, float32", rows)


def main() -> None:
    parser = device_parser(__doc__ or "")
    parser.add_argument("--dtype", nargs="+")
    parser.add_argument("--shape", choices=SHAPES, help="of a random model; without it the model is SmolLM2-135M")
    parser.add_argument("--trl", type=Path, default=TRL, help="an interpreter that has TRL")
    given = parser.parse_args()
    # Without native bfloat16 that dtype may take hours.
    narrow = native_dtype(given.device)
    dtypes = given.dtype or list(dict.fromkeys(["float32", narrow] if given.device == "cpu" else [narrow]))
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
        if given.shape is None:
            model = resolve_model("smollm2-135m", Path.cwd())
        else:
            model = in_a_process(partial(random_model, given.shape, folder, given.device))
        setting = Setting(given.device, model, given.trl)
        if setting.device == "cpu":
            same_loss(folder, setting)
        for dtype in dtypes:
            for run in (ours, trl):
                steps = run(folder, setting, dtype)
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
    name = "peer" if given.shape is None else f"gpu_peer_{given.shape}"
    title = f"A whole step of {BATCH} prompts, at most {setting.new_tokens} new tokens, on {setting.device}"
    report(name, title, table)


if __name__ == "__main__":
    main()
