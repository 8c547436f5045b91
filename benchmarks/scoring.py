"""Teacher scoring in a real engine on SmolLM2-135M: head and log-probs of all rows, as vLLM does, against only those
of the completion.

    python -m benchmarks.scoring

Eight sequences of 150 prompt and 32 completion tokens, the shape of a step of the tool example, K = 64, bfloat16.
"""

import asyncio
import gc
import os
import statistics
import time
from pathlib import Path

import numpy as np

from actors.config import EngineSettings
from actors.worker import engine_environment
from benchmarks.measure import report
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
        gpu_memory_utilization=0.1,
        enforce_eager=True,
        max_probe_gap=1.0,
        threads=len(os.sched_getaffinity(0)),
        kv_cache_gib=1,
        extension=extension,
    )


async def measure() -> dict[str, float]:
    """Median seconds of scoring a batch, each way in turn, both engines alive and the other one idle."""
    from actors.engine import Engine

    rng = np.random.default_rng(0)
    pairs = [
        tuple(rng.integers(100, 40000, n).astype(np.int32) for n in (PROMPT, COMPLETION)) for _ in range(SEQUENCES)
    ]
    engines = {
        "all rows": Engine(settings("benchmarks.all_rows.Extension")),
        "completion rows": Engine(settings("actors.engine.WorkerExtension")),
    }
    times: dict[str, list[float]] = {name: [] for name in engines}
    try:
        for engine in engines.values():
            await engine.start()
        for i in range(ROUNDS + 1):
            for name, engine in engines.items():
                start = time.perf_counter()
                await engine.score(pairs, K)
                if i:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
    finally:
        for engine in engines.values():
            engine.shutdown()
            await asyncio.sleep(0)  # lets the engine's own task end
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    os.environ.update(engine_environment(settings("")))
    seconds = asyncio.run(measure())
    gc.collect()  # the engines' objects, which complain when they are the last to go
    rows = [{"case": name, "s": s, "of all rows": s / seconds["all rows"]} for name, s in seconds.items()]
    report("scoring", f"Scoring {SEQUENCES} x ({PROMPT} + {COMPLETION}) tokens, K = {K}", rows)


if __name__ == "__main__":
    main()
