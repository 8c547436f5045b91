"""Engines that join, leave and are lost while a pool works."""

import asyncio
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from actors.types import Process, Snapshot, UpdateReport, WeightMismatch
from benchmarks import virtual_time
from learner.group import LearnerLost
from services.pools import EnginePool, PoolSettings
from services.published import Published
from services.supervised import Patience
from tests.simulated import Relay, SimulatedEngine

EMPTY = np.zeros(0, dtype=np.int32)


async def elsewhere(role: str) -> list[ray.ObjectRef]:
    raise LearnerLost("the learner died")


@dataclass
class Bench:
    """A pool, the engines it has started, and what it has told."""

    strict: bool = False
    least: int = 2
    most: int = 8
    room: int = 2
    one_by_one: bool = False
    make: Callable[[int], SimulatedEngine] = SimulatedEngine
    started: list[SimulatedEngine] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        patience = Patience(start_s=5, health_s=60, max_restarts=1)
        settings = PoolSettings(
            "student",
            self.least,
            self.most,
            self.strict,
            self.room,
            patience,
            5,
            drain_s=0.5,
            one_by_one=self.one_by_one,
        )
        self.pool = EnginePool(settings, self._create, Published(elsewhere), self.notices.append, lambda: "no room")

    def _create(self, number: int) -> SimulatedEngine:
        self.started.append(self.make(number))
        return self.started[-1]

    async def work(self, count: int) -> list[int]:
        """Which engine did each of so many items, in the items' order."""
        items: list[Any] = list(range(count))  # simulated engines take anything
        sampling: Any = None
        results: list[Any] = await self.pool.generate(items, sampling)
        assert [item for _, item in results] == list(range(count))
        return [engine for engine, _ in results]

    async def settled(self) -> None:
        while self.pool.changing:
            await asyncio.sleep(0.01)

    async def publish(self, version: int, node: str = "here") -> None:
        async with self.pool.published.lock:
            snapshot = Snapshot("student", version, "", node, 0, (), EMPTY, EMPTY.astype(np.float32))
            await self.pool.update_weights(snapshot, 5)


def test_a_strict_pool_cuts_a_batch_by_the_number_of_its_engines_alone() -> None:
    async def run() -> None:
        bench = Bench(strict=True, least=3)
        await bench.pool.start()
        assert await bench.work(7) == [0, 0, 1, 1, 2, 2, 2]
        await bench.pool.stop()

    asyncio.run(run())


def test_one_sequence_has_a_limit_unless_its_batch_has_one() -> None:
    class Stuck(SimulatedEngine):
        def generate(self, items: list[Any], argument: Any) -> tuple[float, list[Any]]:
            return 1e9, items

    async def run() -> None:
        bench = Bench(make=Stuck)
        await bench.pool.start()
        with pytest.raises(TimeoutError, match="waited 5 s for the student engines to generate 1 sequences"):
            await bench.work(1)
        nothing: Any = None
        longer = asyncio.create_task(bench.pool.generate([nothing], nothing, limited=False))
        await asyncio.sleep(50)
        assert not longer.done()
        longer.cancel()
        await bench.pool.stop()

    virtual_time.run(run())


def test_one_that_dies_before_it_has_joined_does_not_hold_up_the_weights_of_the_others() -> None:
    class Slow(SimulatedEngine):
        def start(self) -> tuple[float, None]:
            return 3, None

    async def run() -> None:
        bench = Bench(least=1, make=Slow)
        await bench.pool.start()
        await bench.publish(7)
        async with bench.pool.published.lock:
            bench.pool.resize(2)
            await asyncio.sleep(4)  # it waits for the lock, to load v7
            bench.started[1].die()
            await asyncio.sleep(20)  # and is found dead
        began = asyncio.get_running_loop().time()
        await bench.publish(8)
        assert asyncio.get_running_loop().time() - began < 1
        assert bench.started[0].version == 8
        assert any("student engine 1 did not join" in notice for notice in bench.notices)
        assert len(bench.started) == 2
        await bench.pool.stop()

    virtual_time.run(run())


def test_weights_that_went_with_a_nodes_relay_come_again_and_a_relay_goes_with_its_last_engine() -> None:
    relays: list[Relay] = []

    class Reading(SimulatedEngine):
        """On a node of its own; the first copy that it is given is gone by then."""

        def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
            if self.number == 1 and sum(relay.node == self.node for relay in relays) == 1:
                raise FileNotFoundError(snapshot.path)
            return super().update_weights(snapshot)

    def relay(node: str) -> Relay:
        relays.append(Relay(node))
        return relays[-1]

    async def payload(role: str) -> list[ray.ObjectRef]:
        return []

    async def run() -> None:
        bench = Bench(make=lambda number: Reading(number, node=f"node {number}"))
        bench.pool.published = Published(payload, relay)
        await bench.pool.start()
        await bench.publish(3, node="the learner's")
        assert [engine.version for engine in bench.started] == [3, 3]
        assert all(engine.up for engine in bench.pool.engines)
        assert sorted(one.node for one in relays if not one.killed) == ["node 0", "node 1"]
        bench.pool.vacate({"node 1"})
        await bench.settled()
        assert {one.node for one in relays if not one.killed} == {"node 0", "node 2"}
        await bench.pool.stop()

    virtual_time.run(run())


def test_what_a_lost_engine_had_is_done_by_the_others_before_it_is_back() -> None:
    class Late(SimulatedEngine):
        """The successor, which has the number of the one that it succeeds."""

        def start(self) -> tuple[float, None]:
            return 3, None

    async def run() -> None:
        bench = Bench(room=4)
        await bench.pool.start()
        bench.make = Late
        work = asyncio.create_task(bench.work(8))
        await asyncio.sleep(0.005)
        bench.started[0].die()
        assert set(await work) == {1}
        await bench.settled()
        assert len(bench.started) == 3
        assert bench.notices[0].startswith("student engine 0 (process 1000) died")
        await bench.pool.stop()
        assert all(engine.killed for engine in bench.started)

    virtual_time.run(run())


def test_an_engine_that_was_dead_before_is_stopped_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        bench = Bench()
        await bench.pool.start()
        bench.started[0].die()
        await bench.pool.stop()

    asyncio.run(run())
    gc.collect()
    assert caplog.text == ""


def test_who_joins_has_the_newest_weights_before_it_takes_work() -> None:
    async def run() -> None:
        bench = Bench(least=1)
        await bench.pool.start()
        await bench.publish(7)
        bench.pool.resize(3)
        assert bench.pool.size == 3
        await bench.settled()
        assert [engine.version for engine in bench.started] == [7, 7, 7]
        assert set(await bench.work(12)) == {0, 1, 2}
        assert bench.notices[-1].endswith("has joined (process 1002): 3 student engines")
        await bench.pool.stop()

    asyncio.run(run())


def test_weights_that_come_while_an_engine_joins_do_not_miss_it() -> None:
    """They wait until it has loaded the ones before, and it is one of the pool's by then."""

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
        assert bench.pool.published.lock.locked()
        await bench.publish(8)
        assert [engine.version for engine in bench.started] == [8, 8]
        await bench.pool.stop()

    asyncio.run(run())


@pytest.mark.parametrize(("one_by_one", "begun"), [(True, [0, 2]), (False, [0, 0])])
def test_engines_load_weights_at_once_or_in_turn(one_by_one: bool, begun: list[int]) -> None:
    times: list[float] = []

    class Slow(SimulatedEngine):
        def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
            times.append(asyncio.get_running_loop().time())
            return 2, super().update_weights(snapshot)[1]

    async def run() -> None:
        bench = Bench(one_by_one=one_by_one, make=Slow)
        await bench.pool.start()
        await bench.publish(1)
        await bench.pool.stop()

    virtual_time.run(run())
    assert [time - times[0] for time in times] == pytest.approx(begun)


def test_who_finds_no_place_says_what_is_missing_and_is_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    class Homeless(SimulatedEngine):
        async def placed(self) -> Process:
            await asyncio.sleep(9)
            return await super().placed()

    monkeypatch.setattr("services.pools.PLACED_S", 0.05)

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


def test_who_leaves_finishes_what_it_has_and_is_stopped() -> None:
    async def run() -> None:
        bench = Bench(least=1)
        await bench.pool.start()
        bench.pool.resize(2)
        await bench.settled()
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
        await bench.pool.start()
        bench.pool.resize(2)
        await bench.settled()
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
        bench = Bench(make=lambda number: Late(number, node="spot" if number == 1 else "here"))
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


def test_a_pool_below_its_least_goes_on_trying() -> None:
    """Also when a node is drained and the engine that should take the place of the last one does not start at first."""
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


def test_engines_that_do_not_join_are_tried_ever_more_seldom_until_one_does() -> None:
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


def test_a_successor_that_refuses_the_weights_is_replaced_like_one_that_dies() -> None:
    class Wrong(SimulatedEngine):
        def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
            raise WeightMismatch("its log-probs differ by 3 on average")

    async def run() -> None:
        bench = Bench(least=1)
        await bench.pool.start()
        await bench.publish(1)
        bench.make = Wrong
        bench.started[0].die()
        work = asyncio.create_task(bench.work(1))
        with pytest.raises(RuntimeError, match=r"lost 2 times .* did not come back \(its log-probs differ by 3"):
            await work
        await bench.pool.stop()

    asyncio.run(run())


def test_an_engine_that_keeps_dying_is_given_up_if_enough_remain_and_ends_the_run_if_not() -> None:
    async def run() -> None:
        bench = Bench(least=1, make=lambda number: SimulatedEngine(number, seconds=0.01))
        await bench.pool.start()
        bench.pool.resize(2)
        await bench.settled()
        for _ in range(2):
            next(e for e in reversed(bench.started) if e.number == 1).die()
            await bench.work(4)  # finds it out
            await bench.settled()
        assert "the pool goes on with 1 student engine" in bench.notices[-1]
        assert [engine.name for engine in bench.pool.engines] == ["student engine 0"]
        bench.started[0].die()
        await bench.work(1)
        await bench.settled()
        bench.started[-1].die()
        with pytest.raises(RuntimeError, match=r"student engine 0 was lost 2 times within an hour"):
            await bench.work(1)
        await bench.pool.stop()

    asyncio.run(run())


def test_an_engine_on_another_node_whose_weights_went_with_the_learner_is_not_the_one_that_is_lost() -> None:
    async def run() -> None:
        bench = Bench(least=1, make=lambda number: SimulatedEngine(number, node="there"))
        await bench.pool.start()
        await bench.publish(1)
        assert bench.started[0].version == 0
        assert bench.notices == []
        await bench.pool.stop()

    asyncio.run(run())
