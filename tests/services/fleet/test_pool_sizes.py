"""Engines that join and leave while a pool works."""

import asyncio
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from sdft.actors.shared.types import Process, Snapshot, UpdateReport
from sdft.actors.transport.memory import MemoryTransport
from simulation import virtual_time
from simulation.engine import Relay, SimulatedEngine
from tests.fakes.pool_bench import Bench, Elsewhere


def test_a_late_joiner_has_the_newest_weights_before_it_gets_work() -> None:
    async def run() -> None:
        bench = Bench(least=1)
        await bench.pool.start()
        await bench.publish(7)
        bench.pool.resize(3)
        assert bench.pool.size == 3
        await bench.settled()
        assert [engine.version for engine in bench.started] == [7, 7, 7]
        assert set(await bench.work(12)) == {0, 1, 2}
        assert bench.notices[-1].endswith("has joined (process 1002); the pool has 3 student engines")
        await bench.pool.stop()

    asyncio.run(run())


def test_weights_published_while_an_engine_joins_reach_it() -> None:
    """The update waits until the engine has loaded the version before and has joined the pool."""

    class Slow(SimulatedEngine):
        def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
            return 0.05, super().update_weights(snapshot)[1]

    async def run() -> None:
        bench = Bench(least=1, make=Slow)
        await bench.pool.start()
        await bench.publish(7)
        bench.pool.resize(2)
        while len(bench.started) < 2 or bench.started[1].version < 7:
            await asyncio.sleep(0)
        assert bench.pool.versions.in_use
        await bench.publish(8)
        assert [engine.version for engine in bench.started] == [8, 8]
        await bench.pool.stop()

    asyncio.run(run())


def test_an_engine_without_a_place_reports_what_is_missing_and_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Homeless(SimulatedEngine):
        async def placed(self) -> Process:
            await asyncio.sleep(9)
            return await super().placed()

    monkeypatch.setattr("sdft.services.fleet.pool.PLACED_S", 0.05)

    async def run() -> None:
        bench = Bench(least=1, make=lambda number: (Homeless if number else SimulatedEngine)(number))
        await bench.pool.start()
        bench.pool.resize(2)
        await asyncio.sleep(0.1)
        assert bench.notices == ["student engine 1 waits for a place: no room"]
        assert await bench.work(3) == [0, 0, 0]
        await bench.pool.stop()
        assert bench.started[1].killed

    asyncio.run(run())


def test_a_leaving_engine_finishes_its_work_and_is_stopped() -> None:
    async def run() -> None:
        bench = Bench(least=1)
        await bench.begin(2)
        work = asyncio.create_task(bench.work(4))
        await asyncio.sleep(0.005)
        bench.pool.resize(1)
        assert sorted(await work) == [0, 0, 1, 1]
        await bench.settled()
        assert [engine.killed for engine in bench.started] == [False, True]
        assert set(await bench.work(4)) == {0}
        await bench.pool.stop()

    asyncio.run(run())


def test_what_a_leaving_engine_does_not_finish_in_time_is_done_by_another() -> None:
    async def run() -> None:
        bench = Bench(least=1, make=lambda number: SimulatedEngine(number, seconds=3 if number == 1 else 0.01))
        await bench.begin(2)
        work = asyncio.create_task(bench.work(4))
        await asyncio.sleep(0.005)
        bench.pool.resize(1)
        assert await work == [0, 0, 0, 0]
        await bench.settled()
        await bench.pool.stop()

    asyncio.run(run())


def test_engines_leave_a_node_that_is_being_drained_and_others_come() -> None:
    class Late(SimulatedEngine):
        async def placed(self) -> Process:
            await asyncio.sleep(0.2 if self.number == 2 else 0)
            return await super().placed()

    async def run() -> None:
        transport = MemoryTransport("student", Elsewhere, print, Relay)  # one engine is not on the learner's node
        bench = Bench(make=lambda number: Late(number, node="spot" if number == 1 else "here"), transport=transport)
        await bench.pool.start()
        await bench.publish(3)
        bench.pool.vacate({"spot"})
        await asyncio.sleep(0.1)
        assert not bench.started[1].killed, "it keeps its place until the other one is there"
        await bench.settled()
        assert bench.started[1].killed
        assert set(await bench.work(8)) == {0, 2}
        assert "student engine 1 leaves its node, which is being drained" in bench.notices[0]
        bench.pool.vacate({"spot"})
        assert not bench.pool.changing
        await bench.pool.stop()

    asyncio.run(run())


class Refused(SimulatedEngine):
    async def placed(self) -> Process:
        raise RayActorError


def test_a_pool_below_its_minimum_keeps_starting_engines() -> None:
    """Also if a node is drained and the replacement of the last engine fails to start at first."""
    tries: list[float] = []

    def make(number: int) -> SimulatedEngine:
        tries.append(asyncio.get_running_loop().time())
        return (Refused if 0 < number < 5 else SimulatedEngine)(number, node="here" if number else "spot")

    async def run() -> None:
        bench = Bench(least=1, make=make)
        await bench.pool.start()
        bench.pool.vacate({"spot"})
        nothing: Any = None
        assert await bench.pool.generate([nothing], nothing, limited=False) == [(5, nothing)]
        assert [engine.name for engine in bench.pool.engines] == ["student engine 5"]
        await bench.pool.stop()

    virtual_time.run(run())
    assert np.diff(tries) == pytest.approx([0, 1, 1, 3, 7])


def test_failed_joins_are_retried_with_growing_delays_until_one_succeeds() -> None:
    tries: list[float] = []

    async def run() -> None:
        bench = Bench(least=1)
        await bench.pool.start()
        for tenth in range(2500):
            known = len(bench.started)
            bench.make = SimulatedEngine if len(tries) == 8 else Refused
            bench.pool.resize(2 if len(tries) < 9 else 3)
            tries.extend([tenth / 10] * (len(bench.started) - known))
            await asyncio.sleep(0.1)
        await bench.pool.stop()

    virtual_time.run(run())
    assert np.diff(tries)[:11] == pytest.approx([0, 1, 3, 7, 15, 31, 60, 60, 0, 0, 1], abs=0.2)
