"""A pool of engines: dispatch, weight versions, and the loss of an engine."""

import asyncio
import gc
from typing import Any

import pytest

from sdft.actors.shared.types import Snapshot, UpdateReport, WeightMismatch
from sdft.actors.transport.memory import MemoryTransport
from simulation import virtual_time
from simulation.engine import Relay, SimulatedEngine
from tests.fakes.pool_bench import Bench, Elsewhere


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


def test_an_engine_that_dies_while_it_joins_does_not_delay_the_weights_of_the_others() -> None:
    class Slow(SimulatedEngine):
        def start(self) -> tuple[float, None]:
            return 3, None

    async def run() -> None:
        bench = Bench(least=1, make=Slow)
        await bench.pool.start()
        await bench.publish(7)
        async with bench.in_use():
            bench.pool.resize(2)
            await asyncio.sleep(4)  # the engine waits for the lock, to load v7
            bench.started[1].die()
            await asyncio.sleep(20)  # and its death is detected
        began = asyncio.get_running_loop().time()
        await bench.publish(8)
        assert asyncio.get_running_loop().time() - began < 1
        assert bench.started[0].version == 8
        assert any("student engine 1 did not join" in notice for notice in bench.notices)
        assert len(bench.started) == 2
        await bench.pool.stop()

    virtual_time.run(run())


def test_weights_lost_with_a_relay_are_sent_again_and_a_relay_ends_with_its_last_engine() -> None:
    relays: list[Relay] = []

    class Reading(SimulatedEngine):
        """An engine on its own node. The first copy that it is given has gone."""

        def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
            if self.number == 1 and sum(relay.node == self.node for relay in relays) == 1:
                raise FileNotFoundError(snapshot.path)
            return super().update_weights(snapshot)

    def relay(node: str) -> Relay:
        relays.append(Relay(node))
        return relays[-1]

    async def run() -> None:
        transport = MemoryTransport("student", Elsewhere, print, relay)
        bench = Bench(make=lambda number: Reading(number, node=f"node {number}"), transport=transport)
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


def test_a_lost_engines_work_is_done_by_the_others_before_its_replacement_is_ready() -> None:
    class Late(SimulatedEngine):
        """A replacement, with the number of the lost engine."""

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


def test_stopping_a_dead_engine_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        bench = Bench()
        await bench.pool.start()
        bench.started[0].die()
        await bench.pool.stop()

    asyncio.run(run())
    gc.collect()
    assert caplog.text == ""


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


def test_a_replacement_that_refuses_the_weights_counts_as_lost() -> None:
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
        with pytest.raises(RuntimeError, match=r"lost 2 times .* could not be replaced \(its log-probs differ by 3"):
            await work
        await bench.pool.stop()

    asyncio.run(run())


def test_an_engine_that_keeps_dying_is_given_up_if_enough_remain_and_ends_the_run_if_not() -> None:
    async def run() -> None:
        bench = Bench(least=1, make=lambda number: SimulatedEngine(number, seconds=0.01))
        await bench.begin(2)
        for _ in range(2):
            next(e for e in reversed(bench.started) if e.number == 1).die()
            await bench.work(4)  # detects the loss
            await bench.settled()
        assert "the pool continues with 1 student engine" in bench.notices[-1]
        assert [engine.name for engine in bench.pool.engines] == ["student engine 0"]
        bench.started[0].die()
        await bench.work(1)
        await bench.settled()
        bench.started[-1].die()
        with pytest.raises(RuntimeError, match=r"student engine 0 was lost 2 times within an hour"):
            await bench.work(1)
        await bench.pool.stop()

    asyncio.run(run())


def test_an_engine_whose_weights_were_lost_with_the_learner_does_not_count_as_lost() -> None:
    async def run() -> None:
        bench = Bench(least=1, make=lambda number: SimulatedEngine(number, node="there"))
        await bench.pool.start()
        with pytest.raises(FileNotFoundError, match="engine 0 does not find student weights v1: the learner died"):
            await bench.publish(1)
        assert bench.started[0].version == 0
        assert bench.notices == []
        await bench.pool.stop()

    asyncio.run(run())
