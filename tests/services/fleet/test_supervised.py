"""A supervised engine in a pool, with small actors that die, hang or compute wrongly on request."""

import asyncio
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from sdft.actors.reaper import end
from sdft.actors.remote import RemoteActor
from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import Process, Snapshot, SnapshotDamaged, UpdateReport, WeightMismatch
from sdft.actors.transport.memory import MemoryTransport
from sdft.actors.worker import EngineWorker
from sdft.services.base.failures import Losses
from sdft.services.fleet.engine import Patience, SupervisedEngine
from sdft.services.fleet.versions import Versions
from simulation import virtual_time
from simulation.engine import SimulatedEngine
from tests.fakes.pool_bench import EMPTY, Bench, LostLearner


def mortal() -> type:
    """Return an actor's class.

    A class made in a function is pickled by value: Ray's workers cannot import a test.
    """

    class Mortal:
        """Dies in generate() while at most `lives` actors have started. The first actor refuses odd versions of the
        weights."""

        def __init__(self, folder: Path) -> None:
            self.folder = folder
            self.version = 0

        async def where(self) -> Process:
            return Process(os.getpid(), ray.get_runtime_context().get_node_id())

        async def start(self) -> None:
            (self.folder / str(os.getpid())).touch()

        async def ping(self) -> None: ...

        async def generate(self, lives: int) -> int:
            if len(list(self.folder.iterdir())) <= lives:
                os._exit(1)
            return os.getpid()

        async def loaded(self) -> int:
            return self.version

        async def update_weights(self, snapshot: Snapshot) -> UpdateReport:
            if snapshot.path == "damaged":
                raise SnapshotDamaged("v1 arrived damaged")
            if snapshot.path:
                open(snapshot.path).close()
            first = len(list(self.folder.iterdir())) == 1
            if snapshot.version % 2 and first:
                raise WeightMismatch(f"v{snapshot.version}: log-probs differ by 3 on average")
            self.version = snapshot.version
            return UpdateReport(snapshot.version, 0.0, 0.0)

        async def stop(self) -> None: ...

    return Mortal


class Place:
    """A supervised engine, and the versions that are offered to it."""

    def __init__(self, folder: Path) -> None:
        self.notices: list[str] = []
        self.versions = Versions()
        actor = ray.remote(mortal()).options(num_cpus=0.1)
        self.engine = SupervisedEngine(
            "teacher engine 0",
            lambda: RemoteActor(actor.remote(folder)),
            Patience(60, 2, 2),
            self.versions,
            MemoryTransport("teacher", LostLearner, self.notices.append),
            self.notices.append,
            lambda engine: None,
        )

    @property
    def pid(self) -> int:
        return self.engine.process.pid

    async def update_weights(self, version: int, path: str = "") -> UpdateReport | None:
        async def offer() -> Snapshot:
            node = self.engine.process.node
            return Snapshot("teacher", version, path, node, 0, (), EMPTY, EMPTY.astype(np.float32))

        async with self.versions.offering(offer, 60) as snapshot:
            return await self.engine.update_weights(snapshot)

    async def loaded(self) -> int:
        version: int = await self.engine.call("to say what it has", 60, "loaded")
        return version


def test_a_dead_engines_work_is_done_by_its_replacement(ray_cluster: None, tmp_path: Path) -> None:
    async def run() -> None:
        one = Place(tmp_path)
        await one.engine.start()
        first = one.pid
        # Two calls lose their work to the same death; one replacement does both.
        answers = await asyncio.gather(*(one.engine.call("to generate", 60, "generate", 1) for _ in range(2)))
        assert answers == [one.pid, one.pid]
        assert one.pid != first
        assert one.notices == [
            f"teacher engine 0 (process {first}) died; it is replaced",
            f"teacher engine 0 is back (process {one.pid})",
        ]
        await one.engine.stop()

    asyncio.run(run())


def test_an_engine_that_keeps_dying_ends_the_run_with_a_reason(ray_cluster: None, tmp_path: Path) -> None:
    async def run() -> None:
        one = Place(tmp_path)
        await one.engine.start()
        lost = r"teacher engine 0 was lost 3 times within an hour \(actors.\*.max_restarts: 2\); the last time it died"
        with pytest.raises(RuntimeError, match=lost):
            await one.engine.call("to generate", 60, "generate", 9)
        assert len(list(tmp_path.iterdir())) == 3

    asyncio.run(run())


def test_an_engine_that_hangs_is_replaced_by_one_with_the_newest_weights(ray_cluster: None, tmp_path: Path) -> None:
    async def run() -> None:
        one = Place(tmp_path)
        await one.engine.start()
        await one.update_weights(2)
        hung = one.pid
        os.kill(hung, signal.SIGSTOP)
        assert await one.loaded() == 2
        assert one.notices[0] == f"teacher engine 0 (process {hung}) hangs: no answer for 2 s; it is replaced"
        assert one.pid != hung
        await one.engine.stop()

    asyncio.run(run())


def test_an_engine_that_is_silent_while_weights_load_is_not_replaced() -> None:
    class Silent(SimulatedEngine):
        def ping(self) -> tuple[float, None]:
            return 1e9, None

    async def run() -> None:
        bench = Bench(least=1, make=Silent)
        await bench.pool.start()
        async with bench.in_use():
            await asyncio.sleep(300)
            assert bench.notices == []
        await asyncio.sleep(80)
        assert bench.notices[0].endswith("hangs: no answer for 60 s; it is replaced")
        await bench.pool.stop()

    virtual_time.run(run())


@pytest.mark.parametrize("known", [True, False])
def test_a_replacement_waits_for_the_next_weights_if_the_newest_were_lost_with_the_learner(
    ray_cluster: None, tmp_path: Path, known: bool
) -> None:
    """The death of the learner is known before, or only found during loading."""

    async def run() -> None:
        (tmp_path / "engines").mkdir()
        (tmp_path / "memory").touch()
        one = Place(tmp_path / "engines")
        await one.engine.start()
        await one.update_weights(2, str(tmp_path / "memory"))
        (tmp_path / "memory").unlink()
        if known:
            one.versions.mark_lost()
        os.kill(one.pid, signal.SIGKILL)
        answer = asyncio.create_task(one.loaded())
        while len(list((tmp_path / "engines").iterdir())) < 2:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        assert not answer.done()
        assert await one.update_weights(4) is None
        assert await answer == 4
        await one.engine.stop()

    asyncio.run(run())


def test_an_engine_that_computes_otherwise_than_before_is_replaced(ray_cluster: None, tmp_path: Path) -> None:
    """The replacement loads the same snapshot, and gets no work before it agrees with the learner."""

    async def run() -> None:
        one = Place(tmp_path)
        await one.engine.start()
        assert await one.update_weights(2) is not None
        assert await one.update_weights(3) is None
        assert await one.loaded() == 3
        assert "failed verification" in one.notices[0]
        assert "v3: log-probs differ by 3 on average" in one.notices[0]
        await one.engine.stop()

    asyncio.run(run())


def test_weights_that_the_first_engine_refuses_are_not_the_engines_fault(ray_cluster: None, tmp_path: Path) -> None:
    async def run() -> None:
        one = Place(tmp_path)
        await one.engine.start()
        with pytest.raises(
            WeightMismatch, match=r"^v1: log-probs differ by 3 on average$"
        ):  # without a traceback of Ray's
            await one.update_weights(1)
        with pytest.raises(SnapshotDamaged, match="arrived damaged"):
            await one.update_weights(2, "damaged")
        assert len(list(tmp_path.iterdir())) == 1
        await one.engine.stop()

    asyncio.run(run())


def test_a_stopped_process_is_killed_on_its_node(ray_cluster: None, tmp_path: Path) -> None:
    """In addition to Ray's own kill: the process must free the resources that its replacement waits for."""

    async def run() -> None:
        one = Place(tmp_path)
        await one.engine.start()
        process = one.engine.process
        os.kill(process.pid, signal.SIGSTOP)
        end(process)
        end(Process(os.getpid(), process.node))  # no worker of Ray's: not ended
        deadline = time.monotonic() + 60
        while Path(f"/proc/{process.pid}/cmdline").exists() and Path(f"/proc/{process.pid}/cmdline").read_bytes():
            assert time.monotonic() < deadline, "it is still there"
            await asyncio.sleep(0.1)
        await one.engine.stop()

    asyncio.run(run())


def test_the_back_off_is_bounded_after_many_losses() -> None:
    losses = Losses()
    waits = []
    for _ in range(2000):
        losses.count()
        waits.append(losses.back_off_s)
    assert (waits[:4], waits[-1]) == ([0, 1, 3, 7], 60)


def test_losses_count_for_an_hour_and_the_back_off_grows_until_a_recovery(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(monotonic=iter((0.0, 1800.0, 3601.0, 9000.0, 9001.0)).__next__)
    monkeypatch.setattr("sdft.services.base.failures.time", clock)
    losses = Losses()
    assert ([losses.count() for _ in range(4)], losses.back_off_s) == ([1, 2, 2, 1], 7)
    losses.recovered()
    assert (losses.count(), losses.back_off_s) == (2, 0)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("the first line\n  the second"), "the first line"),
        (KeyError("layers.1.bias"), "KeyError: 'layers.1.bias'"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_reason_is_one_line_and_never_empty_or_a_bare_key(error: Exception, said: str) -> None:
    assert reason(error) == said
    assert reason(RayTaskError("load", "its traceback", error).as_instanceof_cause()) == said


def test_an_actor_that_fails_in_its_constructor_is_reported_by_its_error_without_traceback(ray_cluster: None) -> None:
    class Broken:
        def __init__(self) -> None:
            raise ImportError("no module of that name")

        def call(self) -> None: ...

    with pytest.raises(RayActorError) as lost:
        ray.get(ray.remote(Broken).remote().call.remote(), timeout=60)
    assert reason(lost.value) == "ImportError: no module of that name"


def test_a_result_lost_with_its_node_counts_as_the_loss_of_the_engine() -> None:
    class Method:
        async def remote(self, *arguments: object) -> None:
            raise ObjectLostError("ref", None, "")

    class Handle:
        score = Method()

    async def run() -> None:
        with pytest.raises(RayActorError):
            await RemoteActor(cast(ActorHandle, Handle())).call("score")

    asyncio.run(run())


def test_a_cancelled_update_is_loaded_to_the_end() -> None:
    class Loading:
        dead, loaded = False, False

        async def update_weights(self, snapshot: Snapshot) -> None:
            await asyncio.sleep(0.1)
            self.loaded = True

    async def run() -> None:
        worker, engine = object.__new__(EngineWorker), Loading()
        worker._engine = cast(Any, engine)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.update_weights(cast(Snapshot, None)), 0.02)
        await asyncio.sleep(0.2)
        assert engine.loaded

    asyncio.run(run())
