"""Broadcasts to a pool of simulated engines from a simulated learner: members of the group, and failures."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from sdft.actors.shared.types import LearnerLost, NotReceived, Snapshot, UpdateReport
from sdft.actors.shared.waiting import cancelled
from sdft.actors.transport.broadcast import TRIES, BroadcastTransport
from sdft.actors.transport.named import transport_class
from sdft.services.config.run import RunConfig
from sdft.services.fleet.factory import engine_pool
from simulation.engine import SimulatedEngine
from tests.fakes.pool_bench import Bench


@dataclass
class Learner:
    """Records the sizes of the groups that it joined, and the number of its broadcasts."""

    fails: bool = False
    met: list[int] = field(default_factory=list)
    sent: int = 0

    async def payload(self, role: str) -> list[Any]:
        raise AssertionError("all engines are on the learner's node")

    async def sender(self, method: str, seconds: float, what: str, *arguments: Any) -> Any:
        return await getattr(self, method)(*arguments)

    async def meet(self, role: str) -> tuple[str, int]:
        return "here", 1

    async def join(self, role: str, size: int, timeout_s: float) -> None:
        self.met.append(size)

    async def send(self, role: str, timeout_s: float) -> None:
        if self.fails:
            raise LearnerLost("the learner is lost")
        self.sent += 1


class Member(SimulatedEngine):
    """An engine that records the transport of each update."""

    misses = False  # the next broadcast
    takes_s = 0.0

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.came: list[str] = []
        self.rank = 0

    def connect(self, place: dict[str, Any]) -> tuple[float, None]:
        self.rank = place["rank"]
        return 0, None

    def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
        if snapshot.path:
            self.came.append("memory")
            return super().update_weights(snapshot)
        if self.misses:
            self.misses = False
            raise NotReceived("arrived damaged")
        self.came.append("broadcast")
        return self.takes_s, super().update_weights(snapshot)[1]


def bench(learner: Learner) -> Bench:
    """Return a pool of three engines with a broadcast from the learner."""
    notices: list[str] = []
    transport = BroadcastTransport("student", lambda: learner, notices.append)
    return Bench(least=3, make=Member, transport=transport, notices=notices)


def members(it: Bench) -> list[Member]:
    """Return all engines that have been started."""
    return cast(list[Member], it.started)


def came(it: Bench) -> list[list[str]]:
    """Return the transports of each engine's updates since the last call."""
    how = [engine.came for engine in members(it)]
    for engine in members(it):
        engine.came = []
    return how


@pytest.mark.parametrize("transport", ["memory", "broadcast"])
def test_a_runs_pool_is_sent_weights_by_the_transport_that_is_configured(tmp_path: Path, transport: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = RunConfig.model_validate(
        {"model": "m", "data": {"train": "t"}, "training": {"steps": 1}, "weights": {"transport": transport}}
    )

    async def run() -> None:
        pool = engine_pool(config, tmp_path, (0,), 8, "student", [], print, Learner)
        assert type(pool.transport) is transport_class(transport)

    asyncio.run(run())


def test_a_group_is_formed_once_and_anew_when_its_members_have_changed() -> None:
    async def run() -> None:
        learner = Learner()
        it = bench(learner)
        await it.pool.start()
        for version in (1, 2):
            await it.publish(version)
            assert came(it) == [["broadcast"]] * 3
        assert (learner.met, learner.sent) == ([4], 2)
        assert [engine.rank for engine in members(it)] == [1, 2, 3]
        it.pool.resize(4)
        await it.settled()
        assert came(it) == [[], [], [], ["memory"]]  # a late joiner loads it from memory
        await it.publish(3)
        assert came(it) == [["broadcast"]] * 4
        assert (learner.met, learner.sent) == ([4, 5], 3)
        await it.pool.stop()

    asyncio.run(run())


def test_an_engine_missed_by_a_broadcast_loads_from_memory_and_the_next_has_a_new_group() -> None:
    async def run() -> None:
        learner = Learner()
        it = bench(learner)
        await it.pool.start()
        await it.publish(1)
        came(it)
        members(it)[1].misses = True
        await it.publish(2)
        assert came(it) == [["broadcast"], ["memory"], ["broadcast"]]
        assert [engine.version for engine in it.started] == [2, 2, 2]
        how = "was incomplete: arrived damaged; the engines load them from memory"
        assert it.notices == [f"the broadcast of student weights {how}"]
        await it.publish(3)
        assert came(it) == [["broadcast"]] * 3
        assert learner.met == [4, 4]
        await it.pool.stop()

    asyncio.run(run())


def test_an_engine_lost_while_a_group_forms_is_replaced_and_the_others_load_from_memory() -> None:
    async def run() -> None:
        learner = Learner()
        it = bench(learner)
        await it.pool.start()
        it.started[2].die()
        await it.publish(1)
        assert came(it)[:2] == [["memory"], ["memory"]]
        await it.settled()
        assert members(it)[3].came == ["memory"]
        assert it.notices[:2] == [
            "the broadcast of student weights failed, because no group formed: student engine 2 is lost; the engines "
            "load them from memory",
            "student engine 2 (process 1002) died; it is replaced",
        ]
        await it.publish(2)
        assert [engine.version for engine in it.started] == [2, 2, 0, 2]
        assert learner.met[-1] == 4
        await it.pool.stop()

    asyncio.run(run())


def test_a_cancelled_broadcast_returns_at_once_and_its_group_is_not_used_again() -> None:
    """After an interrupted broadcast its members may stand at different positions of the data."""

    async def run() -> None:
        class Slow(Learner):
            takes_s = 60.0

            async def send(self, role: str, timeout_s: float) -> None:
                await asyncio.sleep(self.takes_s)

        learner = Slow()
        it = bench(learner)
        await it.pool.start()
        for engine in members(it):
            engine.takes_s = 60
        publishing = asyncio.create_task(it.publish(1))
        await asyncio.sleep(0.05)
        assert came(it) == [["broadcast"]] * 3
        async with asyncio.timeout(1):
            await cancelled([publishing])
        learner.takes_s = 0
        for engine in members(it):
            engine.takes_s = 0
        await it.publish(2)
        assert learner.met == [4, 4]
        await it.pool.stop()

    asyncio.run(run())


def test_after_several_slow_failures_no_broadcast_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        learner = Learner(fails=True)
        it = bench(learner)
        await it.pool.start()
        for version in range(1, TRIES + 3):
            await it.publish(version)
        assert len(learner.met) == tries
        said = "the broadcast of student weights failed: the learner is lost; the engines load them from memory"
        assert (
            it.notices == [said] * tries if quick else [said] * (tries - 1) + [f"{said}; no further broadcast is tried"]
        )
        await it.pool.stop()

    quick, tries = True, TRIES + 2
    asyncio.run(run())
    quick, tries = False, TRIES
    monkeypatch.setattr("sdft.actors.transport.broadcast.SLOW_S", -1.0)
    asyncio.run(run())
