"""Time to pack a snapshot, load it into an engine and save a checkpoint, against a copy in memory.

    python -m benchmarks.snapshots

The model is SmolLM2-135M in the dtype of this processor. Learner and engine are actors, as in a run. Packing writes
every tensor (the teacher's rounded from float32 if necessary) into shared memory with a digest. Publishing adds the
log-probs of the probe and the actor call. Loading checks every digest, and vLLM lays the weights out for its kernels.
The pause is how long generation stops. The layout by oneDNN alone is a lower bound on loading as long as the kernels
need it. The copy is from memory to memory that has been written before.
"""

import mmap
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file

from benchmarks.compat import onednn_layout
from benchmarks.learner_step import samples, settings, take_step
from benchmarks.measure import in_a_process, report
from benchmarks.scoring import DTYPE
from benchmarks.scoring import settings as engine_settings
from sdft.actors.worker import EngineWorker
from sdft.learner.shares import shares
from sdft.learner.worker import LearnerWorker, learner_actor

ROUNDS, WAIT_S = 5, 300
LAYOUT = "lay weights out by oneDNN, alone"


def copy_seconds(nbytes: int) -> float:
    """Median seconds of copying `nbytes` bytes."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def timed(call: Any) -> tuple[float, Any]:
    """Seconds until the result of an actor call arrives, and the result."""
    start = time.perf_counter()
    result = ray.get(call, timeout=WAIT_S)
    return time.perf_counter() - start, result


def packing() -> dict[str, list[float]]:
    """Seconds of packing alone in every round, by role."""
    from sdft.learner.weights.publisher import copy_tensors

    learner = LearnerWorker()
    learner.start(settings(), 1, *learner.rendezvous(), np.arange(100, 148, dtype=np.int32))
    take_step(learner, samples(8))
    seconds: dict[str, list[float]] = {}
    memories: dict[str, mmap.mmap] = {}
    for _ in range(ROUNDS + 1):
        for role in ("student", "teacher"):
            nbytes = sum(t.nbytes for _, t in learner._engine.weights(role))
            memory = memories.get(role) or memories.setdefault(role, mmap.mmap(-1, nbytes))
            start = time.perf_counter()
            copy_tensors(learner._engine.weights(role), memory)
            seconds.setdefault(f"pack {role}", []).append(time.perf_counter() - start)
    return seconds


def laying_out() -> tuple[list[float], int]:
    """Seconds in every round to lay out all matrices of the model by oneDNN, and their bytes."""
    stored = load_file(Path(settings().model) / "model.safetensors").values()
    matrices = [tensor.to(getattr(torch, DTYPE)) for tensor in stored if tensor.ndim == 2]
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        laid_out = [onednn_layout(matrix) for matrix in matrices]
        seconds.append(time.perf_counter() - start)
        del laid_out
    return seconds, sum(matrix.nbytes for matrix in matrices)


def measure(scratch: Path) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds in every round and bytes of each kind of transfer."""
    probe = np.arange(100, 148, dtype=np.int32)
    learner = learner_actor("cpu").remote()
    engine = ray.remote(EngineWorker).remote(
        engine_settings("sdft.actors.vllm.extension.WorkerExtension", share_prompts=False)
    )
    address, port = ray.get(learner.rendezvous.remote(), timeout=WAIT_S)
    ray.get([learner.start.remote(settings(), 1, address, port, probe), engine.start.remote()], timeout=WAIT_S)
    (share,) = shares(samples(8), 1, 4096)
    ray.get([learner.fetch.remote(share), learner.train_step.remote()], timeout=WAIT_S)
    seconds: dict[str, list[float]] = {}
    nbytes: dict[str, int] = {}

    def note(name: str, taken: float, size: int) -> None:
        seconds.setdefault(name, []).append(taken)
        nbytes[name] = size

    for i in range(ROUNDS + 1):
        for role in ("student", "teacher"):
            taken, snapshot = timed(learner.publish.remote(role, 1 + i))  # version 0 is the weights in the model folder
            note(f"publish {role}", taken, snapshot.nbytes)
            taken, update = timed(engine.update_weights.remote(snapshot))
            note(f"load {role}, verified", taken, snapshot.nbytes)
            note(f"load {role}, generation paused", update.pause_s, snapshot.nbytes)
        folder = scratch / str(i)
        folder.mkdir()
        start = time.perf_counter()
        ray.get(learner.save.remote(str(folder)), timeout=WAIT_S)
        begun = time.perf_counter() - start
        ray.get(learner.written.remote(), timeout=WAIT_S)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        note("checkpoint, the learner stands still", begun, size)
        note("checkpoint, until it is written", time.perf_counter() - start, size)
        shutil.rmtree(folder)
    ray.get(engine.stop.remote(), timeout=WAIT_S)
    return seconds, nbytes


def main() -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            seconds, nbytes = measure(Path(scratch))
    finally:
        ray.shutdown()
    packed = in_a_process(packing)
    nbytes |= {name: nbytes[name.replace("pack", "publish")] for name in packed}
    seconds[LAYOUT], nbytes[LAYOUT] = in_a_process(laying_out)
    rows = []
    for name, times in (packed | seconds).items():
        median = float(np.median(times[1:]))  # the first round maps memory
        copy = copy_seconds(nbytes[name])
        rows.append(
            {"transfer": name, "MB": nbytes[name] / 1e6, "s": median, "copy s": copy, "of a copy": copy / median}
        )
    report("snapshots", f"Weights and checkpoints against a copy in memory, SmolLM2-135M, {DTYPE}", rows)


if __name__ == "__main__":
    main()
