"""Teacher scoring in a real engine on SmolLM2-135M: head and log-probs of all rows, as vLLM does, against only those
of the completion.

    python -m benchmarks.scoring

Eight sequences of 150 prompt and 32 completion tokens, the shape of a step of the tool example, K = 64, bfloat16.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.config import EngineSettings
from actors.worker import EngineWorker
from benchmarks.measure import report, seconds_in_turn
from services.models import resolve_model

SEQUENCES, PROMPT, COMPLETION, K, ROUNDS = 8, 150, 32, 64, 7


def settings(extension: str) -> EngineSettings:
    return EngineSettings(
        model=str(resolve_model("smollm2-135m", Path.cwd())),
        dtype="bfloat16",
        device="cpu",
        max_model_len=512,
        max_logprobs=K,
        max_num_seqs=SEQUENCES,
        hold=True,
        gpu_memory_utilization=0.1,
        enforce_eager=True,
        max_probe_gap=1.0,
        threads=len(os.sched_getaffinity(0)),
        kv_cache_gib=1,
        extension=extension,
    )


def measure() -> dict[str, float]:
    """Median seconds of scoring a batch, as actors as in a run, in turn: the other engine is idle."""
    rng = np.random.default_rng(0)
    pairs = [
        tuple(rng.integers(100, 40000, n).astype(np.int32) for n in (PROMPT, COMPLETION)) for _ in range(SEQUENCES)
    ]
    extensions = {"all rows": "benchmarks.all_rows.Extension", "completion rows": "actors.engine.WorkerExtension"}
    ray.init(address="local", num_cpus=len(extensions), include_dashboard=False, log_to_driver=False)
    try:
        engines = {name: ray.remote(EngineWorker).remote(settings(e)) for name, e in extensions.items()}
        ray.get([engine.start.remote() for engine in engines.values()], timeout=300)
        cases = {name: partial(score, engine, pairs) for name, engine in engines.items()}
        seconds = seconds_in_turn(cases, ROUNDS)
        ray.get([engine.stop.remote() for engine in engines.values()], timeout=60)
    finally:
        ray.shutdown()
    return seconds


def score(engine: Any, pairs: list[Any]) -> None:
    ray.get(engine.score.remote(pairs, K), timeout=60)


def main() -> None:
    seconds = measure()
    rows = [{"case": name, "s": s, "of all rows": s / seconds["all rows"]} for name, s in seconds.items()]
    report("scoring", f"Scoring {SEQUENCES} x ({PROMPT} + {COMPLETION}) tokens, K = {K}", rows)


if __name__ == "__main__":
    main()
