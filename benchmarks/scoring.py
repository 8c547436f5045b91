"""Teacher scoring in a real engine on SmolLM2-135M: all rows, completion rows only, and with shared prompts.

    python -m benchmarks.scoring

"All rows" computes head and log-probs of all rows, as vLLM does. "Completion rows" computes those of the completion
only. "Prompts shared" also computes a prompt once for all of its rollouts. The batch is eight sequences of 150 prompt
and 32 completion tokens, the shape of a step of the tool example, K = 64, in the dtype of this processor. It has either
eight prompts, or two prompts with four rollouts each.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.measure import report, seconds_in_turn
from sdft.actors.config import EngineSettings
from sdft.actors.worker import EngineWorker
from sdft.services.config.dtype import native_dtype
from sdft.services.planning.models import resolve_model

SEQUENCES, PROMPT, COMPLETION, K, ROUNDS = 8, 150, 32, 64, 7
DTYPE = native_dtype("cpu")
ALL_ROWS, ALONE, SHARED = "all rows", "completion rows", "completion rows, prompts shared"
EXTENSION = "sdft.actors.vllm.extension.WorkerExtension"


def settings(extension: str, share_prompts: bool) -> EngineSettings:
    return EngineSettings(
        model=str(resolve_model("smollm2-135m", Path.cwd())),
        dtype=DTYPE,
        device="cpu",
        max_model_len=512,
        max_logprobs=K,
        max_num_seqs=SEQUENCES,
        hold_batches=True,
        share_prompts=share_prompts,
        gpu_memory_utilization=0.1,
        execution="eager",
        max_probe_gap=1.0,
        threads=len(os.sched_getaffinity(0)),
        kv_cache_gib=1,
        extension=extension,
    )


def sequences(prompts: int) -> list[Any]:
    """SEQUENCES (prompt, completion) pairs, divided equally among `prompts` prompts."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(100, 40000, PROMPT).astype(np.int32) for _ in range(prompts)]
    return [
        (tokens[i * prompts // SEQUENCES], rng.integers(100, 40000, COMPLETION).astype(np.int32))
        for i in range(SEQUENCES)
    ]


def measure() -> dict[tuple[int, str], float]:
    """Median seconds of scoring a batch, by number of prompts and case.

    The engines are actors, as in a run. They run alternately, so the others are idle.
    """
    batches = {prompts: sequences(prompts) for prompts in (SEQUENCES, 2)}
    of = {ALL_ROWS: ("benchmarks.all_rows.Extension", False), ALONE: (EXTENSION, False), SHARED: (EXTENSION, True)}
    ray.init(address="local", num_cpus=len(of), include_dashboard=False, log_to_driver=False)
    try:
        engines = {name: ray.remote(EngineWorker).remote(settings(*given)) for name, given in of.items()}
        ray.get([engine.start.remote() for engine in engines.values()], timeout=300)
        cases = {(p, n): partial(score, engine, pairs) for p, pairs in batches.items() for n, engine in engines.items()}
        seconds = seconds_in_turn(cases, ROUNDS)
        ray.get([engine.stop.remote() for engine in engines.values()], timeout=60)
    finally:
        ray.shutdown()
    return seconds


def score(engine: Any, pairs: list[Any]) -> None:
    ray.get(engine.score.remote(pairs, K), timeout=60)


def main() -> None:
    seconds = measure()
    rows = [
        {"prompts": prompts, "case": case, "s": s, "of all rows": s / seconds[prompts, ALL_ROWS]}
        for (prompts, case), s in seconds.items()
    ]
    report("scoring", f"Scoring {SEQUENCES} x ({PROMPT} + {COMPLETION}) tokens, K = {K}, {DTYPE}", rows)


if __name__ == "__main__":
    main()
