"""Time and memory of a learner step, and its share of the rate of a large matrix product.

    python -m benchmarks.gpu.learner [--device cuda] [--shape 1.5b] [--tokens 32768] [--micro-batch 8192]
                                     [--checkpointing] [--lora 16] [--any-order]

Sequences have 384 prompt and 640 completion tokens, all in the loss, K = 64; with --device cpu 24 and 40, K = 8. The
share counts the operations of `learner_step`'s bound, with adapters two thirds of them: the weights have no gradient.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.sizes import SIZES, shape_parser
from benchmarks.learner_step import launched, samples, settings, take_step
from benchmarks.measure import in_a_process, matrix_rate, report
from benchmarks.operations import Operations
from benchmarks.shapes import random_model
from sdft.actors.shared.process import GIB, kept_heap, openmp_wait_policy
from sdft.learner.config import Forward, LoraConfig, LossConfig
from sdft.learner.types import LearnerSettings
from sdft.learner.worker import LearnerWorker

ROUNDS = 3
LIMIT_S = 1800


@dataclass(frozen=True)
class Case:
    """A step that is measured."""

    device: str
    shape: str
    tokens: int
    micro_batch: int
    checkpointing: bool
    lora: int | None  # rank
    any_order: bool = False  # of additions: not learner.deterministic


def learner_settings(case: Case, model: Path) -> LearnerSettings:
    """Return the settings of the only rank of a run."""
    return settings(
        case.device,
        case.micro_batch,
        model,
        LossConfig(divergence=Forward(top_k=SIZES[case.device].k)),
        gradient_checkpointing=case.checkpointing,
        lora=None if case.lora is None else LoraConfig(rank=case.lora),
        deterministic=not case.any_order,
    )


def measure(case: Case) -> dict[str, object]:
    """Return the row of a step, the median of ROUNDS after one that warms up."""
    size, device = SIZES[case.device], case.device
    length = size.prompt + size.completion
    batch = samples(case.tokens // length, size.prompt, size.completion, size.k)
    tokens = len(batch) * length
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model(case.shape, Path(scratch), device)
        learner = LearnerWorker()
        started = learner_settings(case, model)
        learner.start(started, 1, *learner.rendezvous(), np.arange(100, 132, dtype=np.int32))
        work = Operations.of(model).train(tokens, length, len(batch) * size.completion)
    seconds = []
    for _ in range(ROUNDS + 1):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        take_step(learner, batch)  # reads its loss back, so the GPU has ended
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[1:])
    row: dict[str, object] = {"shape": case.shape, "tokens": tokens, "micro-batch": case.micro_batch}
    row |= {"checkpointing": case.checkpointing, "LoRA": case.lora or "", "deterministic": not case.any_order}
    row |= {"s": step, "tokens/s": tokens / step}
    if device == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / GIB
        row["kernels"], row["busy s"] = launched(lambda: take_step(learner, batch))
    rate = matrix_rate(getattr(torch, started.dtype), device)
    done = work * (1 if case.lora is None else 2 / 3) / step
    torch.distributed.destroy_process_group()
    return row | {"TFLOP/s": done / 1e12, "of a large product": done / rate}


def main() -> None:
    parser = shape_parser(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=32768, help="of a step")
    parser.add_argument("--micro-batch", type=int, default=8192, help="tokens in one forward")
    parser.add_argument("--checkpointing", action="store_true", help="as learner.gradient_checkpointing")
    parser.add_argument("--lora", type=int, help="rank of adapters; without it all weights are trained")
    parser.add_argument("--any-order", action="store_true", help="as learner.deterministic: false")
    given = Case(**vars(parser.parse_args()))
    # The environment of a strict run. It needs a new process: OpenMP reads it at the import of torch, glibc at start.
    os.environ.update(openmp_wait_policy(exclusive=True) | kept_heap(given.device))
    parts = {"checkpointing": given.checkpointing, "lora": given.lora, "any_order": given.any_order}
    kind = "_".join([given.shape, *(name for name, holds in parts.items() if holds)])
    report(f"gpu_learner_{kind}", f"Learner step on {given.device}", [in_a_process(partial(measure, given), LIMIT_S)])


if __name__ == "__main__":
    main()
