"""The engine's side of turns: requests of users, and calls of a window's run, each with the weights of its owner.

    /v1/...                     ─► turn of the release ─► vLLM's server
    POST /sdft/turn (a call)    ─► turn of the pool    ─► the engine's method ─► its result, or its exception

The weights of the release, and those that each pool has sent, are kept in this process's memory, so a turn loads them
without the learner. Every load is verified, as an update in a run is. Calls are pickled: the socket belongs to this
user alone.
"""

import asyncio
import mmap
import os
import pickle
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sdft.actors.shared.process import anonymous_memory
from sdft.actors.shared.types import Snapshot, UpdateReport
from sdft.services.serving.turns.order import Turns

if TYPE_CHECKING:
    from sdft.actors.vllm.engine import VllmEngine

RELEASE = "the release"  # the owner of the weights that users are answered with; no pool has such a name
PATH = "/sdft/turn"
GONE = 410  # status: this process does not have the caller's weights, or not any more
ENDS_S = 2.0  # within which this process ends, once the weights of the release cannot be loaded
GONE_EVERY_S = 0.5  # between two looks whether the caller is still there


class Owners:
    """The weights of each owner, and the engine that loads them."""

    def __init__(
        self, engine: "VllmEngine", of_folder: Callable[[str, Path], Snapshot], free: Callable[[str], None]
    ) -> None:
        """of_folder(owner, folder): packs the weights of a folder as version 0, in memory of this process.

        free(owner): frees that memory.
        """
        self._engine, self._of_folder, self._free = engine, of_folder, free
        self.broken: Exception | None = None  # why the weights of the release cannot be loaded any more
        self._kept: dict[str, Snapshot] = {}
        self._memory: dict[str, tuple[int, mmap.mmap]] = {}
        self._folders: dict[str, Path] = {}  # what owners without kept weights begin with
        self._reports: dict[str, UpdateReport] = {}
        self.packing = asyncio.Lock()  # held while kept weights are overwritten or loaded
        self.turns = Turns(self._load)

    def keep(self, owner: str, snapshot: Snapshot, loaded: bool = False) -> None:
        """Keep weights in memory of this process as those of an owner. loaded: the engine has them."""
        self._kept[owner] = snapshot
        self.turns.outdated(owner)
        if loaded:
            self.turns.owner = owner

    async def loaded(self, owner: str) -> UpdateReport:
        """Load the owner's weights, if the engine has others; report on their last load.

        Raises what `VllmEngine.update_weights` raises.
        """
        async with self.turns.of(owner):
            return self._reports[owner]

    async def begin(self, owner: str, folder: str) -> int:
        """Forget an owner's weights. It begins with those of a folder. Returns this process's id."""
        await self.forget(owner)
        self._folders[owner] = Path(folder)
        return os.getpid()

    async def forget(self, owner: str) -> None:
        """Free the memory of an owner's weights."""
        async with self.packing:
            self._kept.pop(owner, None)
            fd, memory = self._memory.pop(owner, (None, None))
            if fd is not None and memory is not None:
                memory.close()
                os.close(fd)
            self._free(owner)
            self.turns.outdated(owner)

    async def update(self, owner: str, snapshot: Snapshot) -> UpdateReport:
        """Copy a learner's snapshot, load and verify it. Raises what `VllmEngine.update_weights` raises."""
        async with self.packing:
            self.keep(owner, await asyncio.to_thread(self._copied, owner, snapshot))
        return await self.loaded(owner)

    async def call(self, owner: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of the engine in the owner's turn."""
        async with self.turns.of(owner):
            return await getattr(self._engine, method)(*arguments)

    @property
    def dead(self) -> bool:
        """Whether the engine has died. This process then ends, too."""
        return self._engine.dead

    async def ping(self, owner: str) -> None:
        """Return when the engine has answered."""
        await self._engine.ping()

    async def _load(self, owner: str) -> None:
        async with self.packing:
            if owner not in self._kept:
                self._kept[owner] = await asyncio.to_thread(self._of_folder, owner, self._folders[owner])
            try:
                self._reports[owner] = await self._engine.update_weights(self._kept[owner])
            except Exception as error:
                if owner == RELEASE:
                    self.broken = error
                    await asyncio.sleep(ENDS_S)  # the process ends, and the gateway asks another one
                raise

    def _copied(self, owner: str, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot in memory of this process.

        Raises FileNotFoundError if it is gone, and SnapshotDamaged; what was kept before then stays.

        Adapters stay adapters: a turn merges them into the model that the run began with.
        """
        from sdft.actors.shared.digests import check_digests  # imports torch
        from sdft.actors.shared.pinned import mapped

        with open(snapshot.path, "rb") as file:
            check_digests(snapshot, mapped(file), self._engine.settings.threads)
            if owner not in self._memory:
                self._memory[owner] = anonymous_memory(f"sdft-{owner}", snapshot.nbytes)
            fd, memory = self._memory[owner]
            memory.seek(0)
            while block := file.read(1 << 24):
                memory.write(block)
        return replace(snapshot, path=f"/proc/{os.getpid()}/fd/{fd}", base=str(self._folders[owner]))


class InTurn:
    """Answers users in the turn of the release. Everything else goes through."""

    def __init__(self, app: ASGIApp, turns: Turns) -> None:
        self._app, self._turns = app, turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            async with self._turns.of(RELEASE):
                await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def turn_route(owners: Owners) -> Callable[[Request], Any]:
    """Return the handler of PATH. A call: (process, owner, method, arguments).

    process: the id of the process that the caller means; another one does not have its weights. None: any.
    """
    own: dict[str, Callable[..., Awaitable[Any]]] = {
        "begin": owners.begin,
        "forget": owners.forget,
        "update": owners.update,
        "ping": owners.ping,
    }

    async def answered(owner: str, method: str, arguments: tuple[Any, ...]) -> bytes:
        try:
            work = own[method](owner, *arguments) if method in own else owners.call(owner, method, arguments)
            return pickle.dumps((True, await work))
        except Exception as error:  # noqa: BLE001 - raised by the caller
            return pickle.dumps((False, _sendable(error)))

    async def route(request: Request) -> Response:
        process, owner, method, arguments = pickle.loads(await request.body())
        if process not in (None, os.getpid()):
            return Response(status_code=GONE)
        call = asyncio.create_task(answered(owner, method, arguments))
        while not call.done():
            await asyncio.wait([call], timeout=GONE_EVERY_S)
            # An update goes on: its thread could not be stopped.
            if not call.done() and method != "update" and await request.is_disconnected():
                call.cancel()  # the run has ended, and users wait
                with suppress(asyncio.CancelledError):
                    await call
                return Response(status_code=499)
        # What a call raises because the engine has died is no error of the run, which waits for the next engine.
        return Response(status_code=GONE) if owners.dead else Response(call.result())

    return route


def _sendable(error: Exception) -> Exception:
    """Return an exception that the caller can load: itself, or its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
