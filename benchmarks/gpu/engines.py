"""Decoding and scoring by one engine, beside plain vLLM.

    python -m benchmarks.gpu.engines [--device cuda] [--shape 1.5b]

32 streams of 512 tokens behind prompts of 384, and scores of 32 x (576 + 512) tokens, K = 64; with --device cpu four
short ones. The time of a decoding step is that of all tokens without that of the first, over their number. The engines
share the device and run in turn, so the others are idle.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.gpu.plain_engine import PlainEngine
from benchmarks.gpu.sizes import SIZES, Sizes, shape_parser
from benchmarks.measure import in_a_process, report
from benchmarks.shapes import random_model
from sdft.actors.config import EngineSettings
from sdft.actors.shared.process import GIB
from sdft.actors.shared.types import GenerateRequest, IntArray, Sampling
from sdft.actors.worker import EngineWorker
from sdft.services.config.dtype import native_dtype

ROUNDS, WAIT_S = 3, 600
PLAIN, SHARE = "plain vLLM", 0.3  # of a GPU, of each engine


def engine_settings(model: Path, device: str, transport: str = "memory") -> EngineSettings:
    """Return the settings of an engine with sdft's defaults for a device."""
    size = SIZES[device]
    return EngineSettings(
        model=str(model),
        dtype=native_dtype(device),
        device=device,
        max_model_len=size.teacher_prompt + size.completion + 1,
        max_logprobs=size.k,
        max_num_seqs=2 * size.sequences,
        hold_batches=True,
        share_prompts=False,
        gpu_memory_utilization=0.1,  # the cache has a size of its own
        execution="graphs" if device == "cuda" else "eager",
        max_probe_gap=1.0,
        threads=None,
        kv_cache_gib=size.cache_gib,
        transport=transport,
        exclusive=True,
    )


def actor(kind: Any, device: str, share: float, *arguments: Any) -> Any:
    """Start an actor on a share of a GPU, or on a CPU."""
    return ray.remote(kind).options(num_cpus=0, num_gpus=share if device == "cuda" else 0).remote(*arguments)


def tokens(rng: np.random.Generator, count: int) -> IntArray:
    """Return random token ids."""
    return rng.integers(100, 40000, count).astype(np.int32)


def decoding(engine: Any, prompts: list[IntArray]) -> Callable[[int], tuple[float, int]]:
    """Return a function that samples up to a number of tokens: seconds, and tokens of the longest completion."""

    def run(new_tokens: int) -> tuple[float, int]:
        requests = [GenerateRequest(ids, seed) for seed, ids in enumerate(prompts)]
        start = time.perf_counter()
        rollouts = ray.get(engine.generate.remote(requests, Sampling(new_tokens)), timeout=WAIT_S)
        return time.perf_counter() - start, max(len(rollout.completion_ids) for rollout in rollouts)

    return run


def measure(model: Path, device: str) -> list[dict[str, Any]]:
    """Return a row for each engine."""
    size, rng = SIZES[device], np.random.default_rng(0)
    settings = engine_settings(model, device)
    ours = {"sdft": settings}
    if device == "cuda":
        ours["sdft, execution: eager"] = replace(settings, execution="eager")
    engines = {name: actor(EngineWorker, device, SHARE, given) for name, given in ours.items()}
    cache = int(size.cache_gib * GIB)
    shape = settings.dtype, device, settings.max_model_len, settings.max_num_seqs, cache
    plain = actor(PlainEngine, device, SHARE, str(model), *shape)
    ray.get([engine.start.remote() for engine in (*engines.values(), plain)], timeout=WAIT_S)
    prompts = [tokens(rng, size.prompt) for _ in range(size.sequences)]
    pairs = [(tokens(rng, size.teacher_prompt), tokens(rng, size.new_tokens)) for _ in range(size.sequences)]

    def of_plain(new_tokens: int) -> tuple[float, int]:
        return ray.get(plain.decode.remote(prompts, new_tokens), timeout=WAIT_S), new_tokens

    runs = {name: decoding(engine, prompts) for name, engine in engines.items()} | {PLAIN: of_plain}
    steps: dict[str, list[float]] = {name: [] for name in runs}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    scored: dict[str, list[float]] = {name: [] for name in engines}
    for i in range(ROUNDS + 1):
        for name, run in runs.items():
            first, _ = run(1)
            whole, longest = run(size.new_tokens)
            if i:  # the first round warms up
                steps[name].append(1000 * (whole - first) / (longest - 1))
                rates[name].append(size.sequences * longest / whole)
        for name, engine in engines.items():
            start = time.perf_counter()
            ray.get(engine.score.remote(pairs, size.k), timeout=WAIT_S)
            if i:
                scored[name].append(_scored(size) / (time.perf_counter() - start))
    ray.get([engine.stop.remote() for engine in (*engines.values(), plain)], timeout=WAIT_S)
    least = statistics.median(steps[PLAIN])
    return [
        {
            "engine": name,
            "ms per decoding step": statistics.median(steps[name]),
            "of plain vLLM": statistics.median(steps[name]) / least,
            "tokens/s, at most": statistics.median(rates[name]),
            "scored tokens/s": statistics.median(scored[name]) if name in scored else "",
        }
        for name in runs
    ]


def _scored(size: Sizes) -> int:
    """Return the tokens that are read to score a batch."""
    return size.sequences * (size.teacher_prompt + size.new_tokens)


def main() -> None:
    given = shape_parser(__doc__ or "").parse_args()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            model = in_a_process(partial(random_model, given.shape, Path(scratch), given.device))
            rows = measure(model, given.device)
    finally:
        ray.shutdown()
    title = f"{SIZES[given.device].sequences} streams of {SIZES[given.device].new_tokens} tokens, {given.shape}"
    report(f"gpu_engines_{given.shape}", f"{title}, on {given.device}", rows)


if __name__ == "__main__":
    main()
