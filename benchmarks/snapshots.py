"""Time to pack a snapshot, load it into an engine and save a checkpoint, against a copy in memory.

    python -m benchmarks.snapshots

The model is SmolLM2-135M in the dtype of this processor. Learner and engine are actors, as in a run. Packing writes
every tensor (the teacher's rounded from float32 if necessary) into shared memory, and other threads digest it beside
that; the row "one after the other" does the same in one thread. Publishing adds the log-probs of the probe and the
actor call. Loading checks every digest, and vLLM lays the weights out for its kernels.
The pause is how long generation stops. The layout by oneDNN alone is a lower bound on loading as long as the kernels
need it. The copy is from memory to memory that has been written before.
"""

import mmap
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file

from benchmarks.compat import onednn_layout
from benchmarks.learner_step import samples, settings, take_step
from benchmarks.measure import in_a_process, report, seconds_in_turn
from benchmarks.scoring import DTYPE
from benchmarks.scoring import settings as engine_settings
from sdft.actors.shared.digests import check_digests, digest
from sdft.actors.shared.packed import pack
from sdft.actors.shared.types import Snapshot
from sdft.actors.worker import EngineWorker
from sdft.learner.shares import shares
from sdft.learner.worker import LearnerWorker, learner_actor

Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]
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


def one_after_the_other(weights: Weights, payload: torch.Tensor) -> None:
    """Copy each tensor and then digest it, in one thread: what copy_tensors is compared with."""
    view = memoryview(payload.numpy())
    for entry in pack(weights(), payload):
        digest(view[entry.offset : entry.offset + entry.nbytes])


def packing() -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds, and bytes, of packing alone and of checking the digests alone."""
    from sdft.learner.weights.buffers import copy_tensors

    probe = np.arange(100, 148, dtype=np.int32)
    learner = LearnerWorker()
    learner.start(settings(), 1, *learner.rendezvous(), probe)
    take_step(learner, samples(8))
    cases: dict[str, Callable[[], object]] = {}
    nbytes: dict[str, int] = {}
    threads = torch.get_num_threads()

    def add(name: str, size: int, case: Callable[[], object]) -> None:
        cases[name], nbytes[name] = case, size

    def beside(weights: Weights, payload: torch.Tensor) -> None:
        copy_tensors(weights(), payload, threads)

    for role in ("student", "teacher"):
        weights = partial(learner._engine.weights, role)
        size = sum(t.nbytes for _, t in weights())
        payload = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        add(f"pack {role}, one after the other", size, partial(one_after_the_other, weights, payload))
        add(f"pack {role}", size, partial(beside, weights, payload))
    entries = copy_tensors(weights(), payload, threads)
    snapshot = Snapshot("teacher", 1, "", "", size, entries, probe, np.zeros(0, np.float32))
    view = memoryview(payload.numpy())
    for count in (1, threads):
        add(f"check digests, threads: {count}", size, partial(check_digests, snapshot, view, count))
    return seconds_in_turn(cases, ROUNDS), nbytes


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
    medians, of_packing = in_a_process(packing)
    nbytes |= of_packing
    seconds[LAYOUT], nbytes[LAYOUT] = in_a_process(laying_out)
    medians |= {name: float(np.median(times[1:])) for name, times in seconds.items()}  # the first round maps memory
    rows = []
    for name, median in medians.items():
        copy = copy_seconds(nbytes[name])
        rows.append(
            {"transfer": name, "MB": nbytes[name] / 1e6, "s": median, "copy s": copy, "of a copy": copy / median}
        )
    report("snapshots", f"Weights and checkpoints against a copy in memory, SmolLM2-135M, {DTYPE}", rows)


if __name__ == "__main__":
    main()
