"""The data plane by reference, with real actors: ranks fetch their shares, and notice what a dead engine has held."""

import time
from typing import Any

import numpy as np
import pytest
import ray

from benchmarks.random_engine import Worker
from sdft.actors.shared.drafts import CompletionLost, Draft, Turn
from sdft.actors.shared.types import GenerateRequest, SampleId, Sampling, Support
from sdft.learner.shares import shares
from sdft.learner.worker import learner_actor

PROMPT = np.arange(3, dtype=np.int32)
TOKENS, SUPPORT = 5, Support("teacher", 4)


def actor(kind: Any) -> Any:
    return kind.options(num_cpus=0.1).remote()


def test_each_rank_fetches_its_share_and_names_what_was_lost_with_an_engine(ray_cluster: None) -> None:
    engine = ray.remote(Worker)
    student, teacher = actor(engine), actor(engine)
    ranks = [actor(learner_actor("cpu")) for _ in range(2)]
    requests = [GenerateRequest(PROMPT, i) for i in range(4)]
    completions = ray.get(student.complete.remote(requests, Sampling(TOKENS)), timeout=60)
    items = [(PROMPT, completion) for completion in completions]
    scores = ray.get(teacher.score_completions.remote(items, SUPPORT), timeout=60)
    drafts = [
        Draft(SampleId(0, 0, i, 0), i, (Turn(PROMPT, completion, score),))
        for i, (completion, score) in enumerate(zip(completions, scores, strict=True))
    ]
    divided = shares(drafts, 2, 100)
    assert [len(share.sequences) for share in divided] == [2, 2]

    def lost() -> list[SampleId]:
        fetched = [rank.fetch.remote(share) for rank, share in zip(ranks, divided, strict=True)]
        return sorted(sample for of_rank in ray.get(fetched, timeout=60) for sample in of_rank)

    assert lost() == []
    ray.kill(student)
    deadline = time.monotonic() + 60
    while lost() != [draft.sample for draft in drafts]:
        assert time.monotonic() < deadline, "the values of a dead engine are still there"
        time.sleep(0.1)
    with pytest.raises(CompletionLost):
        ray.get(teacher.score_completions.remote(items, SUPPORT), timeout=60)
    for left in (teacher, *ranks):
        ray.kill(left)
