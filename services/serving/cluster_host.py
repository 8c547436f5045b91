"""Engines on the nodes of a Ray cluster: each process is the child of an actor, which Ray places where there is room.

    gateway ─► actor.start ─► process on the actor's node, which answers on a port with a key
    gateway ◄────── HTTP ──────► process

The process ends with its actor, and the actor with the service. Ray's autoscaler adds a node for an actor that finds no
room.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray.exceptions import RayError

from sdft.actors.remote import RemoteActor
from sdft.actors.shared.process import die_with_parent, scratch_folder
from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import Process
from sdft.actors.shared.waiting import within
from sdft.services.cluster.cluster import free, labelled, needs
from sdft.services.config.service import ClusterPlace
from sdft.services.serving.host import NotStarted, how_ended, log_end, session

BACKLOG = 1024
STOP_S = 2.0  # for an actor to end its process


class EngineNode:
    """The actor: runs one process on its node."""

    def __init__(self) -> None:
        self._scratch = ExitStack()

    async def where(self) -> Process:
        return Process(os.getpid(), ray.get_runtime_context().get_node_id())

    async def start(self, program: Sequence[str], given: dict[str, Any], key: str) -> tuple[int, str, int]:
        """Start the process. Returns its id, and the address and port on which it will answer.

        program: what this node's Python is given.
        """
        folder = self._scratch.enter_context(scratch_folder("sdft-node-"))
        address = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=BACKLOG) as listens:
            settings = folder / "engine.json"
            settings.write_text(json.dumps(given | {"listen": {"fd": listens.fileno(), "key": key}}))
            self._log = folder / "engine.log"
            with self._log.open("ab") as file:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *program,
                    str(settings),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)},
                    pass_fds=[listens.fileno()],
                    preexec_fn=die_with_parent,
                )
            return self._process.pid, address, listens.getsockname()[1]

    async def ended(self) -> tuple[int, str]:
        """Wait for the end of the process, and remove its files. Returns its exit code and the end of its log."""
        code = await self._process.wait()
        text = log_end(self._log)
        self._scratch.close()
        return code, text

    async def stop(self) -> None:
        """End the process: `ended` returns."""
        if self._process.returncode is None:
            self._process.kill()


class ClusterHost:
    """Starts processes on the nodes of the cluster to which this process is connected."""

    def __init__(self, program: Sequence[str], place: ClusterPlace, gpus: float, wait_s: float) -> None:
        """program: its Python, which may be another one on another node, and what it is given.

        gpus: of each engine. wait_s: how long an engine may wait for room in the cluster.
        """
        self._program, self._wait_s = list(program[1:]), wait_s
        self._actor = ray.remote(EngineNode).options(
            num_cpus=place.cpus, num_gpus=gpus, label_selector=dict(place.labels), max_restarts=0
        )
        self._room = f"a node{labelled(place.labels)} with {needs(place.cpus, gpus)} free"

    async def start(self, name: str, given: dict[str, Any], log: Path) -> "ClusterProcess":
        actor, key = RemoteActor(self._actor.remote()), secrets.token_urlsafe(32)
        try:
            await within(actor.placed(), self._wait_s, "room in the cluster")
            pid, address, port = await within(
                actor.call("start", self._program, given, key), self._wait_s, f"the process of {name}"
            )
        except TimeoutError as error:
            actor.kill()
            now = await asyncio.to_thread(free)
            raise NotStarted(f"{error}; it needs {self._room}; free in the cluster now: {now}") from None
        except RayError as error:
            actor.kill()
            raise NotStarted(reason(error)) from error
        except asyncio.CancelledError:
            actor.kill()
            raise
        host = f"[{address}]" if ":" in address else address
        headers = {"Authorization": f"Bearer {key}"}
        http = session(f"http://{host}:{port}", aiohttp.TCPConnector(limit=0), headers=headers)
        return ClusterProcess(actor, pid, address, http, log)


class ClusterProcess:
    """A process on a node of the cluster."""

    def __init__(self, actor: RemoteActor, pid: int, place: str, http: aiohttp.ClientSession, log: Path) -> None:
        self.pid, self.place, self.http = pid, place, http
        self._actor, self._log = actor, log
        self._killing: asyncio.Task[None] | None = None
        self._ended = asyncio.create_task(self._end(), name=f"end of the engine's process {pid}")

    @property
    def running(self) -> bool:
        return not self._ended.done()

    def kill(self) -> None:
        if self._killing is None:
            self._killing = asyncio.create_task(self._kill(), name=f"kill the engine's process {self.pid}")

    async def wait(self) -> str:
        how = await asyncio.shield(self._ended)
        await self.http.close()
        return how

    async def _end(self) -> str:
        try:
            code, log = await self._actor.call("ended")
        except RayError as error:
            return (
                how_ended(-signal.SIGKILL, "") if self._killing is not None else f"its actor was lost: {reason(error)}"
            )
        self._actor.kill()
        self._keep(log)
        return how_ended(code, log)

    async def _kill(self) -> None:
        """Have the actor end its process, which brings the log, and kill it if it does not do so soon."""
        with suppress(RayError, TimeoutError):
            await within(self._actor.call("stop"), STOP_S, "the end of an engine's process")
            await asyncio.wait([self._ended], timeout=STOP_S)
        self._actor.kill(hangs=not self._ended.done())

    def _keep(self, log: str) -> None:
        with suppress(OSError), self._log.open("a") as file:  # the service goes on without it
            file.write(log)
