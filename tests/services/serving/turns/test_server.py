"""Calls of a run and requests of users at one engine, over a real socket; the engine notes which weights it has."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import uvicorn
import xxhash
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sdft.actors.config import TURNS
from sdft.actors.shared.process import anonymous_memory
from sdft.actors.shared.types import Sampling, Snapshot, SnapshotDamaged, TensorEntry, UpdateReport
from sdft.services.serving.turns.client import TurnEngine
from sdft.services.serving.turns.server import PATH, RELEASE, InTurn, Owners, turn_route
from tests.actors.vllm.test_engine import engine_settings

EMPTY = np.zeros(0, np.float32)


class Odd(Exception):
    """It is pickled, and cannot be loaded again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class Engine:
    """Holds the bytes of a snapshot as its weights."""

    def __init__(self) -> None:
        self.settings = engine_settings(Path("base"))
        self.holds, self.loads, self.slow = b"", 0, asyncio.Event()
        self.dead = False

    async def update_weights(self, snapshot: Snapshot) -> UpdateReport:
        self.holds, self.loads = Path(snapshot.path).read_bytes(), self.loads + 1
        return UpdateReport(snapshot.version, 0.5, 0.25)

    async def generate(self, requests: list[Any], sampling: Sampling) -> list[Any]:
        if requests == ["slow"]:
            await self.slow.wait()
        if requests == ["odd"]:
            raise Odd("one", "two")
        if requests == ["last"]:
            self.dead = True
            raise RuntimeError("the engine has died")
        return [(self.holds, request) for request in requests]

    async def ping(self) -> None: ...


def packed(role: str, version: int, payload: bytes) -> tuple[Snapshot, Any]:
    fd, memory = anonymous_memory(role, len(payload))
    memory[:] = payload
    path = f"/proc/{os.getpid()}/fd/{fd}"
    tensor = TensorEntry("weight", "uint8", (len(payload),), 0, len(payload), xxhash.xxh3_128_hexdigest(payload))
    return Snapshot(role, version, path, "", len(payload), (tensor,), EMPTY.astype(np.int32), EMPTY), memory


@asynccontextmanager
async def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Engine, Owners, TurnEngine]]:
    """Yield an engine that answers on a socket, and the client of a run's student."""
    engine = Engine()
    owners = Owners(engine, lambda owner, folder: packed(owner, 0, folder.name.encode())[0], lambda owner: None)  # type: ignore[arg-type]
    owners.keep(RELEASE, packed(RELEASE, 1, b"release")[0])

    async def asked(request: Request) -> PlainTextResponse:
        return PlainTextResponse(engine.holds)

    app = Starlette(routes=[Route("/v1/asked", asked), Route(PATH, turn_route(owners), methods=["POST"])])
    socket = folder / "engine.sock"
    monkeypatch.setenv(TURNS, str(socket))
    server = uvicorn.Server(uvicorn.Config(InTurn(app, owners.turns), uds=str(socket), log_level="warning"))
    answering = asyncio.create_task(server.serve())
    client = TurnEngine(replace(engine_settings(folder / "base"), pool="student"))
    try:
        async with asyncio.timeout(20):
            await client.start()
            yield engine, owners, client
    finally:
        if client._http is not None:
            await client._http.close()
        server.should_exit = True
        await asyncio.wait([answering])


async def ask() -> bytes:
    connector = aiohttp.UnixConnector(os.environ[TURNS])
    async with aiohttp.ClientSession(connector=connector) as session, session.get("http://engine/v1/asked") as reply:
        return await reply.read()


def test_each_owner_gets_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with served(tmp_path, monkeypatch) as (engine, _, student):
            assert await student.generate(["a"], Sampling(1)) == [(b"base", "a")]  # type: ignore[list-item]
            assert await ask() == b"release"
            snapshot, memory = packed("student", 3, b"three")
            assert await student.update_weights(snapshot) == UpdateReport(3, 0.5, 0.25)
            memory[:] = b"-----"  # the learner packs its next version
            assert await ask() == b"release"
            assert await student.generate(["b"], Sampling(1)) == [(b"three", "b")]  # type: ignore[list-item]
            loads = engine.loads
            await student.generate(["c"], Sampling(1))  # type: ignore[list-item]
            assert engine.loads == loads
            with pytest.raises(RuntimeError, match="Odd: one and two"):
                await student.generate(["odd"], Sampling(1))  # type: ignore[list-item]
            damaged, memory = packed("student", 13, b"wrong")
            memory[:] = b"wrang"
            with pytest.raises(SnapshotDamaged, match="v13"):
                await student.update_weights(damaged)
            assert await student.generate(["d"], Sampling(1)) == [(b"three", "d")]  # type: ignore[list-item]
            assert not student.dead
            assert await ask() == b"release"
            await asyncio.to_thread(student.stop)

    asyncio.run(run())


def test_a_call_whose_run_has_ended_holds_no_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with served(tmp_path, monkeypatch) as (_, _, student):
            call = asyncio.create_task(student.generate(["slow"], Sampling(1)))  # type: ignore[list-item]
            await asyncio.sleep(0.3)
            call.cancel()
            assert await ask() == b"release"

    asyncio.run(run())


def test_another_process_has_no_weights_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine was started again: the run's engine counts as dead, and the next one begins anew."""

    async def run() -> None:
        async with served(tmp_path, monkeypatch) as (_, _, student):
            student._process = 1  # as if the answers came from another one
            with pytest.raises(aiohttp.ClientResponseError, match="410"):
                await student.generate(["a"], Sampling(1))  # type: ignore[list-item]
            assert student.dead

    asyncio.run(run())


def test_the_error_of_a_call_at_which_the_engine_dies_is_a_lost_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with served(tmp_path, monkeypatch) as (_, _, student):
            with pytest.raises(aiohttp.ClientResponseError, match="410"):
                await student.generate(["last"], Sampling(1))  # type: ignore[list-item]
            assert student.dead

    asyncio.run(run())


def test_a_release_that_cannot_be_loaded_again_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway then starts the engine again; until then it would answer nothing and look healthy."""

    async def run() -> None:
        async with served(tmp_path, monkeypatch) as (_, owners, student):
            await student.generate(["a"], Sampling(1))  # type: ignore[list-item]
            owners.keep(RELEASE, replace(packed(RELEASE, 1, b"release")[0], path="/gone"))
            await ask()
            assert isinstance(owners.broken, FileNotFoundError)

    asyncio.run(run())


def test_a_windows_run_without_its_service_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(TURNS, raising=False)
    alone = TurnEngine(replace(engine_settings(tmp_path), pool="student"))
    with pytest.raises(RuntimeError, match=r"actors\.student\.engine: vllm"):
        asyncio.run(alone.start())
