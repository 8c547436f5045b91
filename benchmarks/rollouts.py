"""Rollouts and their scores in real engines on SmolLM2-135M: plain norms, fused norms and a compiled model.

    python -m benchmarks.rollouts

Plain norms are those that vLLM's CPU platform chooses, fused norms are our engines' default, and the compiled model is
execution: compiled. The workload is a step of benchmarks.peer, 32 prompts and at most 128 new tokens, K = 64, in the
dtype of this processor. Rounding, and therefore the sampled tokens, differ between the engines. So rollout times are
given per decoding step; there are as many as the longest completion has tokens. All three engines score the rollouts of
one engine. The bound counts floating-point operations, at the rate of a large matrix product.
"""

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoTokenizer

from benchmarks.measure import matrix_rate, report
from benchmarks.operations import Operations
from benchmarks.peer import BATCH, NEW_TOKENS, K, rows
from benchmarks.scoring import DTYPE, EXTENSION, settings
from sdft.actors.config import Execution
from sdft.actors.shared.types import GenerateRequest, IntArray, Sampling
from sdft.actors.worker import EngineWorker

ROUNDS, WAIT_S = 4, 600
PLAIN = "plain norms"
CASES: dict[str, tuple[str, Execution]] = {
    PLAIN: ("benchmarks.plain_norms.Extension", "eager"),
    "fused norms, the default": (EXTENSION, "eager"),
    "compiled": (EXTENSION, "compiled"),
}


def contexts(model: Path) -> tuple[list[IntArray], list[IntArray]]:
    """Token ids of the student's prompts and of the teacher's."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def ids(text: str) -> IntArray:
        chat = [{"role": "user", "content": text}]
        return np.asarray(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False), np.int32)

    batch = rows()[:BATCH]
    return [ids(r["prompt"]) for r in batch], [ids(f"{r['prompt']}\n\n{r['demonstration']}") for r in batch]


def measure(engines: dict[str, Any], model: Path) -> list[dict[str, Any]]:
    """Medians of each engine. The engines run alternately, so the others are idle."""
    students, teachers = contexts(model)
    requests = [GenerateRequest(ids, seed) for seed, ids in enumerate(students)]
    operations = Operations.of(model)

    def rolled_out(engine: Any) -> tuple[float, list[IntArray]]:
        """Seconds taken and the completions."""
        start = time.perf_counter()
        rollouts = _get(engine.generate.remote(requests, Sampling(NEW_TOKENS)))
        return time.perf_counter() - start, [r.completion_ids for r in rollouts]

    def bound(rate: float, contexts: list[IntArray], completions: list[IntArray]) -> float:
        """Lower bound on the seconds of a forward over these completions after their contexts."""
        answered = sum(map(len, completions))
        tokens = sum(map(len, contexts)) + answered
        return operations.forward(tokens, tokens / BATCH, answered) / rate

    _, scored = rolled_out(engines[PLAIN])
    pairs = list(zip(teachers, scored, strict=True))
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in engines}
    for i in range(ROUNDS + 1):
        for name, engine in engines.items():
            rate = matrix_rate(getattr(torch, DTYPE))
            seconds, completions = rolled_out(engine)
            start = time.perf_counter()
            _get(engine.score.remote(pairs, K))
            scores = time.perf_counter() - start
            if i:  # the first round warms up
                step = 1000 * seconds / max(map(len, completions))
                bounds = seconds / bound(rate, students, completions), scores / bound(rate, teachers, scored)
                times[name].append((step, scores, *bounds))
    medians = {name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in times.items()}
    plain = medians[PLAIN]
    return [
        {"engine": name, "ms per decoding step": step, "of plain": step / plain[0], "x bound": of_bound}
        | {"s of scores": scores, "scores of plain": scores / plain[1], "scores x bound": scores_of_bound}
        for name, (step, scores, of_bound, scores_of_bound) in medians.items()
    ]


def _get(call: Any) -> Any:
    return ray.get(call, timeout=WAIT_S)


def main() -> None:
    given = {
        name: replace(settings(extension, share_prompts=False), max_num_seqs=BATCH, execution=execution, exclusive=True)
        for name, (extension, execution) in CASES.items()
    }
    ray.init(address="local", num_cpus=len(given), include_dashboard=False, log_to_driver=False)
    try:
        engines = {name: ray.remote(EngineWorker).remote(each) for name, each in given.items()}
        _get([engine.start.remote() for engine in engines.values()])
        table = measure(engines, Path(given[PLAIN].model))
        _get([engine.stop.remote() for engine in engines.values()])
    finally:
        ray.shutdown()
    report("rollouts", f"{BATCH} rollouts of at most {NEW_TOKENS} tokens, and their scores, {DTYPE}", table)


if __name__ == "__main__":
    main()
