"""Queries to the cluster that only advise a run: one that fails, and one that is never answered."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from ray.exceptions import GetTimeoutError, RpcError

from sdft.services.cluster.queries import Outage, Query
from sdft.services.fleet.node_watch import watch_nodes
from simulation.engine import SimulatedEngine
from tests.fakes.pool_bench import Bench


def test_a_run_outlives_failing_queries_and_reports_them_once() -> None:
    answers: Iterator[set[str] | Exception] = iter(
        [RpcError("GCS is away"), GetTimeoutError("no answer"), OSError("broken"), set(), {"spot"}]
    )
    notices: list[str] = []

    def drained() -> set[str]:
        answer = next(answers, set())
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def run() -> None:
        bench = Bench(make=lambda number: SimulatedEngine(number, node="spot" if number == 1 else "here"))
        await bench.pool.start()
        watching = asyncio.create_task(watch_nodes({"student": bench.pool}, None, notices.append, drained, 0.01))
        while not bench.notices:
            await asyncio.sleep(0.01)
            assert not watching.done()
        watching.cancel()
        assert "student engine 1 leaves its node, which is being drained" in bench.notices[0]
        await bench.pool.stop()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert notices == [
        "the query for nodes that are being drained fails (GCS is away); the run continues and retries the query",
        "the query for nodes that are being drained works again after 0 s",
    ]


def test_a_bug_is_not_taken_for_an_outage() -> None:
    with pytest.raises(KeyError), Outage("the query", print).tolerated():
        raise KeyError("a mistake")


def test_an_unanswered_query_is_sent_once_and_blocks_neither_the_loop_nor_its_end() -> None:
    asked: list[float] = []
    answered = threading.Event()

    def ask() -> str:
        asked.append(time.monotonic())
        answered.wait()
        return "the answer"

    query = Query(ask, limit_s=0.05)

    async def twice() -> None:
        for _ in range(2):
            with pytest.raises(TimeoutError, match=r"no answer for 0\.05 s"):
                await query.answer()

    began = time.monotonic()
    asyncio.run(twice())  # with asyncio.to_thread, run() would wait for the thread
    assert time.monotonic() - began < 5
    assert len(asked) == 1
    answered.set()
    assert asyncio.run(query.answer()) == "the answer"
