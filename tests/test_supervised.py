"""An engine's place in a pool, with actors of a few lines that die when they are asked to."""

import asyncio
import os
from functools import partial
from pathlib import Path

import pytest
import ray

from services.supervised import SupervisedEngine


def mortal() -> type:
    """An actor's class. Made in a function it travels to Ray's workers whole: they cannot import a test."""

    class Mortal:
        """Dies at work while no more than `lives` actors have been started."""

        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def start(self) -> int:
            (self.folder / str(os.getpid())).touch()
            return os.getpid()

        def generate(self, lives: int) -> int:
            if len(list(self.folder.iterdir())) <= lives:
                os._exit(1)
            return os.getpid()

    return Mortal


def engine(folder: Path, notices: list[str]) -> SupervisedEngine:
    create = partial(ray.remote(mortal()).options(num_cpus=0.1).remote, folder)
    return SupervisedEngine("teacher engine 0", create, 60, 2, notices.append)


def test_a_dead_engines_work_is_done_by_its_successor(ray_cluster: None, tmp_path: Path) -> None:
    async def run() -> None:
        notices: list[str] = []
        one = engine(tmp_path, notices)
        await one.start()
        first = one.pid
        # Two calls at once lose their work to the same death: one successor does both.
        answers = await asyncio.gather(*(one.call("to generate", 60, "generate", 1) for _ in range(2)))
        assert answers == [one.pid, one.pid]
        assert one.pid != first
        assert notices == [
            f"teacher engine 0 (process {first}) died; another takes its place",
            f"teacher engine 0 is back (process {one.pid})",
        ]

    asyncio.run(run())


def test_an_engine_that_keeps_dying_ends_the_run_with_a_reason(ray_cluster: None, tmp_path: Path) -> None:
    async def run() -> None:
        one = engine(tmp_path, [])
        await one.start()
        with pytest.raises(RuntimeError, match=r"teacher engine 0 has died 3 times \(actors.\*.max_restarts: 2\)"):
            await one.call("to generate", 60, "generate", 9)
        assert len(list(tmp_path.iterdir())) == 3

    asyncio.run(run())
