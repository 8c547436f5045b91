"""Weight updates of one role, with simulated engines and a simulated learner."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from sdft.actors.shared.types import Snapshot, SnapshotDamaged, UpdateReport
from sdft.learner.group import LearnerGroup
from sdft.services.base.errors import RunFailed
from sdft.services.training.weight_sync import WeightSync
from simulation import cluster
from simulation.engine import SimulatedEngine
from tests.fakes.pool_bench import EMPTY, Bench


class Learner:
    """Publishes empty snapshots, and records its calls."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def publish(self, role: str, version: int) -> Snapshot:
        self.asked.append(f"publish {version}")
        return Snapshot(role, version, "/memory", "here", 0, (), EMPTY, EMPTY.astype(np.float32))


def damaged(*which: int, gone: bool = False) -> Callable[[int], SimulatedEngine]:
    """Return a factory of engines that refuse the snapshots with these numbers, counted from 1 over all engines.

    gone: they do not find them.
    """
    given = itertools.count(1)

    class Refusing(SimulatedEngine):
        def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
            if next(given) in which:
                if gone:
                    raise FileNotFoundError("no such file")
                raise SnapshotDamaged(f"v{snapshot.version} arrived damaged")
            return 0.05, super().update_weights(snapshot)[1]

    return Refusing


def weights(bench: Bench) -> tuple[WeightSync, Learner]:
    learner = Learner()
    return WeightSync("student", bench.pool, cast(LearnerGroup, learner), 5, bench.notices.append), learner


def test_a_snapshot_that_arrives_damaged_is_published_again_the_first_one_too() -> None:
    """The limit counts failures in a row."""

    async def run() -> None:
        bench = Bench(strict=True, least=1, make=damaged(1, 2, 4, 5))
        await bench.pool.start()
        sync, learner = weights(bench)
        assert await sync.deliver(0) == 0.0
        assert learner.asked == ["publish 0"] * 3
        assert bench.notices == ["v0 arrived damaged; the snapshot is published again"] * 2
        assert await sync.deliver(1) == 0.0
        assert learner.asked[3:] == ["publish 1"] * 3
        await bench.pool.stop()

    asyncio.run(run())


def test_a_snapshot_that_always_arrives_damaged_ends_the_run() -> None:
    async def run() -> None:
        bench = Bench(strict=True, least=1, make=damaged(1, 2, 3))
        await bench.pool.start()
        sync, _ = weights(bench)
        with pytest.raises(SnapshotDamaged):
            await sync.deliver(0)
        await bench.pool.stop()

    asyncio.run(run())


def test_a_snapshot_that_is_gone_is_not_taken_for_delivered() -> None:
    """The file of a user's own transport may be missing while the learner is alive."""

    async def run() -> None:
        bench = Bench(strict=True, least=1, make=damaged(2, 3, 4, 5, gone=True))
        await bench.pool.start()
        sync, learner = weights(bench)
        await sync.deliver(0)
        with pytest.raises(RunFailed, match="student engine 0 does not find student weights v1: no such file"):
            await sync.deliver(1)
        assert (sync.version, learner.asked) == (0, ["publish 0"] + ["publish 1"] * 3)
        await bench.pool.stop()

    asyncio.run(run())


def test_a_strict_run_sends_the_same_version_again_and_another_waits_for_the_next() -> None:
    async def run(strict: bool) -> list[str]:
        bench = Bench(strict=strict, least=1, make=damaged(1))
        await bench.pool.start()
        sync, learner = weights(bench)
        await sync.publish(1)
        await sync.wait_delivered()
        assert sync.version == (1 if strict else -1)
        await sync.publish(2)
        await sync.wait_delivered()
        assert sync.version == bench.started[0].version == 2
        await bench.pool.stop()
        return learner.asked

    assert asyncio.run(run(True)) == ["publish 1", "publish 1", "publish 2"]
    assert asyncio.run(run(False)) == ["publish 1", "publish 2"]


def test_the_learner_goes_on_while_engines_load_and_the_next_version_waits_for_them() -> None:
    async def run() -> None:
        bench = Bench(least=2, make=damaged())
        await bench.pool.start()
        sync, learner = weights(bench)
        told: list[int] = []
        sync.on_delivered = told.append
        await sync.publish(1)
        assert (learner.asked, told) == (["publish 1"], [])
        await sync.publish(2)
        assert (learner.asked, told) == (["publish 1", "publish 2"], [1])
        await sync.wait_for_version(2, 2)
        assert told == [1, 2]
        await sync.wait_for_version(3, 4)
        assert sync.version == 4
        await bench.pool.stop()

    asyncio.run(run())


def test_weights_are_sent_at_the_configured_intervals(tmp_path: Path) -> None:
    class Told(cluster.Learner):
        async def publish(self, role: str, version: int) -> Snapshot:
            sent[role].append(version)
            return await super().publish(role, version)

    sent: dict[str, list[int]] = {"student": [], "teacher": []}
    case = cluster.Case("seldom", engines=1, staleness=1, steps=7)
    one = cluster.prepared(case, 8)
    weights = one.config.weights.model_copy(update={"sync_every": 2, "teacher_sync_every": 3})
    one = replace(one, config=one.config.model_copy(update={"weights": weights}))
    with Path("/dev/null").open("w") as nowhere:
        cluster.drive(one, tmp_path, case, lambda n: cluster.Student(n, case), Told(0.1), nowhere)
    assert sent == {"student": [0, 2, 4, 6, 7], "teacher": [0, 3, 6]}  # the student's last weights are evaluated


def test_an_update_stopped_before_it_begins_leaves_no_version_in_use() -> None:
    """As when the learner is lost right after it has published."""

    async def run() -> None:
        bench = Bench(least=1)
        await bench.pool.start()
        sync, _ = weights(bench)
        await sync.publish(1)
        await sync.stop()
        assert not bench.pool.versions.in_use
        await bench.pool.stop()

    asyncio.run(run())
