"""Seconds of a weight update, from the call of the learner to the verified weights in an engine.

    python -m benchmarks.gpu.update [--device cuda] [--shape 1.5b]

On a GPU by each of weights.transport memory and ipc, learner and engine on one GPU. Generation stops for the pause.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.gpu.engines import WAIT_S, actor, engine_settings
from benchmarks.gpu.learner import Case, learner_settings
from benchmarks.gpu.sizes import SIZES, shape_parser
from benchmarks.learner_step import samples
from benchmarks.measure import in_a_process, report
from benchmarks.shapes import random_model
from sdft.actors.worker import EngineWorker
from sdft.learner.shares import shares
from sdft.learner.worker import learner_actor

ROUNDS = 5
TRANSPORTS = {"cpu": ("memory",), "cuda": ("memory", "ipc")}
PARTS = ("publish s", "load s", "whole s", "pause s")


def measure(model: Path, device: str, transport: str) -> list[dict[str, Any]]:
    """Return a row for each role: medians of ROUNDS after one that maps memory."""
    size = SIZES[device]
    length = size.prompt + size.completion
    case = Case(device, "", length, length, checkpointing=True, lora=None)
    settings = replace(learner_settings(case, model), transport=transport)
    gpus = 0.5 if device == "cuda" else 0
    learner = learner_actor(device).options(num_cpus=0, num_gpus=gpus).remote()
    engine = actor(EngineWorker, device, gpus, engine_settings(model, device, transport))
    address, port = ray.get(learner.rendezvous.remote(), timeout=WAIT_S)
    probe = np.arange(100, 148, dtype=np.int32)
    ray.get([learner.start.remote(settings, 1, address, port, probe), engine.start.remote()], timeout=WAIT_S)
    (share,) = shares(samples(1, size.prompt, size.completion, size.k), 1, length)
    ray.get([learner.fetch.remote(share), learner.train_step.remote()], timeout=WAIT_S)
    rows = []
    for role in ("student", "teacher"):
        found: list[tuple[float, ...]] = []
        for version in range(1, ROUNDS + 2):
            start = time.perf_counter()
            snapshot = ray.get(learner.publish.remote(role, version), timeout=WAIT_S)
            published = time.perf_counter() - start
            update = ray.get(engine.update_weights.remote(snapshot), timeout=WAIT_S)
            whole = time.perf_counter() - start
            found.append((published, whole - published, whole, update.pause_s))
        medians = map(statistics.median, zip(*found[1:], strict=True))
        row = {"transport": transport, "role": role, "GB": snapshot.nbytes / 1e9}
        rows.append(row | dict(zip(PARTS, medians, strict=True)))
    ray.get(engine.stop.remote(), timeout=WAIT_S)
    for each in (engine, learner):
        ray.kill(each)
    return rows


def main() -> None:
    given = shape_parser(__doc__ or "").parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = in_a_process(partial(random_model, given.shape, Path(scratch), given.device))
        for transport in TRANSPORTS[given.device]:
            ray.init(address="local", include_dashboard=False, log_to_driver=False)
            try:
                rows += measure(model, given.device, transport)
            finally:
                ray.shutdown()
    report(f"gpu_update_{given.shape}", f"A weight update of {given.shape} on {given.device}", rows)


if __name__ == "__main__":
    main()
