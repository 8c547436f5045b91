"""Share of bfloat16 weights that a step changes, and whether sending only those would be smaller.

    python -m benchmarks.changed

The first steps of the tool example are run and recorded. The learner then trains on the same batches at the example's
learning rate and at 1e-5, without warm-up. Float32 weights are rounded to bfloat16 before they are compared. A changed
value takes 4 bytes instead of 2 (weights.transport: changes).
"""

import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.learner_step import take_step
from benchmarks.measure import report
from sdft.learner.config import OptimizerConfig
from sdft.learner.types import LearnerSettings
from sdft.learner.worker import LearnerWorker
from sdft.services.config.load import load_config
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import learner_settings
from sdft.services.records.batches import read_batch

EXAMPLE, STEPS = Path("examples/tools/tools.yaml"), 8
RATES = (5e-5, 1e-5)


def record(run_dir: Path) -> None:
    overrides = [
        f"training.steps={STEPS}",
        f"learner.optimizer.lr={RATES[0]}",
        "teacher.temperature=1",
        "monitoring.record_rollouts=true",
        "evaluation.sets=[]",
    ]
    words = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "sdft.services.cli", "train", str(EXAMPLE), "--run-dir", str(run_dir), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1200)


def shares(settings: LearnerSettings, run_dir: Path) -> list[float]:
    """Share of the student's bfloat16 values that each step changes."""
    import torch

    learner = LearnerWorker()
    learner.start(settings, 1, *learner.rendezvous(), np.arange(100, 132, dtype=np.int32))
    engine = learner._engine
    before = {name: tensor.to(torch.bfloat16, copy=True) for name, tensor in engine.weights("student")}
    found = []
    for step in range(1, STEPS + 1):
        take_step(learner, read_batch(run_dir, step))
        changed = total = 0
        for name, tensor in engine.weights("student"):
            now = tensor.to(torch.bfloat16, copy=True)
            changed += int((now.view(torch.int16) != before[name].view(torch.int16)).sum())
            total += now.numel()
            before[name] = now
        found.append(changed / total)
    return found


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        record(Path(scratch))
        prepared = prepare(load_config(EXAMPLE), EXAMPLE)
        base = learner_settings(prepared)
        for lr in RATES:
            optimizer = OptimizerConfig(lr=lr, warmup_steps=0, schedule="constant")
            settings = replace(base, stages=tuple(replace(stage, optimizer=optimizer) for stage in base.stages))
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(shares, settings, Path(scratch)).result(timeout=1200)
            mean = float(np.mean(found[1:]))
            rows.append({"lr": lr, "first step": found[0], "later steps": mean, "changes / whole": 2 * mean})
    report("changed", f"Share of bfloat16 weights changed by a step, tool example, {STEPS} steps", rows)


if __name__ == "__main__":
    main()
