"""Engines on the nodes of a cluster: real Ray, processes of a few lines."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from aiohttp import ClientSession

from sdft.services.config.service import ClusterPlace
from sdft.services.serving.cluster_host import ClusterHost, ClusterProcess
from sdft.services.serving.host import NotStarted
from tests.fakes.small_service import PROGRAMS

HALF = ClusterPlace(cpus=0.5)


async def started(log: Path, **given: Any) -> ClusterProcess:
    """Return a process that answers."""
    process = await ClusterHost(PROGRAMS.engine, HALF, 0, 60).start("engine 0", {"release": 7} | given, log)
    async with asyncio.timeout(30):
        async with process.http.get("/health") as reply:  # the port listens before the process does
            assert reply.status == 200
    return process


def test_it_answers_its_gateway_only_and_ends_with_its_actor(ray_cluster: None, tmp_path: Path) -> None:
    async def run() -> None:
        process = await started(tmp_path / "log")
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        async with process.http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "1"}) as reply:
            assert (await reply.json())["choices"][0]["message"]["content"] == "release 7: Hi"
        async with ClientSession(process.http._base_url) as stranger, stranger.get("/health") as refused:
            assert refused.status == 401
        assert process.running
        process.kill()
        assert await process.wait() == "signal 9"
        assert not process.running
        async with asyncio.timeout(30):
            while Path(f"/proc/{process.pid}").exists():
                await asyncio.sleep(0.05)

    asyncio.run(run())


def test_its_end_is_explained(ray_cluster: None, tmp_path: Path) -> None:
    async def run() -> tuple[str, str]:
        killed = await started(tmp_path / "killed")
        os.kill(killed.pid, signal.SIGKILL)
        # What it was given lacks a release: the process ends with an error.
        broken = await ClusterHost(PROGRAMS.engine, HALF, 0, 60).start("engine 0", {}, tmp_path / "broken")
        return await killed.wait(), await broken.wait()

    assert asyncio.run(run()) == ("signal 9", "exit code 1; KeyError: 'release'")
    assert "KeyError: 'release'" in (tmp_path / "broken").read_text()


def test_a_lost_actor_is_named(ray_cluster: None, tmp_path: Path) -> None:
    async def run() -> str:
        process = await started(tmp_path / "log")
        ray.kill(process._actor._handle)
        return await process.wait()

    assert asyncio.run(run()).startswith("its actor was lost: ")


def test_no_room(ray_cluster: None, tmp_path: Path) -> None:
    host = ClusterHost(PROGRAMS.engine, ClusterPlace(cpus=64, labels={"pool": "serving"}), 0, 1)
    with pytest.raises(NotStarted) as found:
        asyncio.run(host.start("engine 0", {}, tmp_path / "log"))
    assert str(found.value).startswith(
        "waited 1 s for room in the cluster; it needs a node labelled pool=serving with 64 CPUs free; free in the "
        "cluster now: "
    )
