"""What passes through the driver in one batch: drafts, which refer to values in Ray's object store, against values.

    python -m benchmarks.data_plane

256 sequences, K = 64, one student engine, one teacher engine and two learner ranks on Ray. The engines return random
numbers at once, and the ranks fetch their shares without a step: only the way of the data is measured. "by value" sends
rollouts and scores to the driver and training sequences to the ranks. Bytes are those of the pickled arguments and
results of all calls. Memory is the growth of the driver's resident memory, each case in a process of its own.
"""

import asyncio
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.measure import in_a_process, report
from benchmarks.random_engine import Worker
from sdft.actors.remote import RemoteActor
from sdft.actors.shared.drafts import Completion, Draft, Scores, Turn, joined
from sdft.actors.shared.types import GenerateRequest, SampleId, Sampling, Support
from sdft.learner.shares import shares
from sdft.learner.worker import learner_actor

SEQUENCES, K, PROMPT, TEACHER_PROMPT = 256, 64, 128, 256
TOKENS = (256, 512, 1024, 2048)
RANKS, BUDGET = 2, 16384
ENGINES = {"num_cpus": 0.5}


class Counted:
    """Calls actors, and adds up the bytes of arguments and results."""

    def __init__(self) -> None:
        self.nbytes = 0

    async def call(self, actor: Any, method: str, *arguments: Any) -> Any:
        result = await RemoteActor(actor).call(method, *arguments)
        self.nbytes += len(pickle.dumps(arguments)) + len(pickle.dumps(result))
        return result


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) / 1024


async def batch(by_reference: bool, tokens: int) -> tuple[float, float]:
    """Return MB through the driver, and the MiB that its memory grew by, for one batch after a first small one."""
    student, teacher = (ray.remote(Worker).options(**ENGINES).remote() for _ in range(2))
    ranks = [learner_actor("cpu").options(**ENGINES).remote() for _ in range(RANKS)]

    async def one(count: int) -> tuple[float, float]:
        counted, before = Counted(), resident_mib()
        prompt, shown = np.zeros(PROMPT, np.int32), np.zeros(TEACHER_PROMPT, np.int32)
        requests, sampling = [GenerateRequest(prompt, i) for i in range(count)], Sampling(tokens)
        completions = await counted.call(student, "complete" if by_reference else "generate", requests, sampling)
        if by_reference:
            pairs = [(shown, completion) for completion in completions]
            scores = await counted.call(teacher, "score_completions", pairs, Support("teacher", K))
        else:
            pairs = [(shown, rollout.completion_ids) for rollout in completions]
            found = await counted.call(teacher, "score", pairs, K)
            completions = [Completion.of(rollout) for rollout in completions]
            scores = [Scores(score, score.version) for score in found]
        made = [
            Draft(SampleId(0, 0, i, 0), i, (Turn(prompt, completion, score),))
            for i, (completion, score) in enumerate(zip(completions, scores, strict=True))
        ]
        sequences = made if by_reference else [joined(draft, draft.references) for draft in made]
        divided = shares(sequences, RANKS, BUDGET)
        lost = [await counted.call(rank, "fetch", share) for rank, share in zip(ranks, divided, strict=True)]
        assert lost == [[]] * RANKS
        return counted.nbytes / 1e6, resident_mib() - before

    await one(RANKS)
    return await one(SEQUENCES)


def measure(by_reference: bool, tokens: int) -> tuple[float, float]:
    """Measure one case on a cluster of its own."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2 << 30)
    try:
        return asyncio.run(batch(by_reference, tokens))
    finally:
        ray.shutdown()


def main() -> None:
    rows = []
    for tokens in TOKENS:
        held, grown = in_a_process(partial(measure, True, tokens))
        value, its_growth = in_a_process(partial(measure, False, tokens))
        rows.append(
            {
                "tokens": tokens,
                "MB, by reference": held,
                "MB, by value": value,
                "MiB grown, by reference": max(0.0, grown),
                "MiB grown, by value": its_growth,
            }
        )
    report("data_plane", f"Through the driver, {SEQUENCES} sequences, K = {K}", rows)


if __name__ == "__main__":
    main()
