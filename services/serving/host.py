"""Where the processes of engines run: on this machine, or on the nodes of a cluster (`cluster_host.py`)."""

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from sdft.actors.shared.process import die_with_parent

LOG_TAIL = 4096  # bytes of a log that are searched for the cause of an end
READ_BYTES = 1 << 20


class NotStarted(Exception):
    """A process could not be started. The message says why."""


class EngineProcess(Protocol):
    """One process of an engine."""

    pid: int
    place: str  # for people
    http: aiohttp.ClientSession  # to it

    @property
    def running(self) -> bool: ...

    def kill(self) -> None:
        """Have it end."""

    async def wait(self) -> str:
        """Wait for its end, and close what belongs to it. Returns how it ended."""


class Host(Protocol):
    """Starts processes."""

    async def start(self, name: str, given: dict[str, Any], log: Path) -> EngineProcess:
        """Start the process of the engine `name`. given: its settings, without where it answers. Raises NotStarted."""


class LocalHost:
    """Starts processes on this machine, which answer on Unix sockets."""

    def __init__(self, program: Sequence[str], sockets: Path) -> None:
        """program: the command line, to which the file of settings is added. sockets: a folder."""
        self._program, self._sockets = program, sockets

    def socket(self, name: str) -> Path:
        """Return where the engine `name` answers."""
        return self._sockets / f"{name.replace(' ', '-')}.sock"

    async def start(self, name: str, given: dict[str, Any], log: Path) -> "LocalProcess":
        socket = self.socket(name)
        socket.unlink(missing_ok=True)
        settings = socket.with_suffix(".json")
        settings.write_text(json.dumps(given | {"listen": {"path": str(socket)}}))
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *self._program,
                str(settings),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                # Files that a killed engine leaves behind go with the folder.
                env=os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(self._sockets)},
                preexec_fn=die_with_parent,
            )
        connector = aiohttp.UnixConnector(str(socket), limit=0)
        return LocalProcess(process, session("http://engine", connector), log)


class LocalProcess:
    """A child of this process."""

    def __init__(self, process: asyncio.subprocess.Process, http: aiohttp.ClientSession, log: Path) -> None:
        self.pid, self.place, self.http = process.pid, "this machine", http
        self._process, self._log = process, log

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    def kill(self) -> None:
        if self.running:
            self._process.kill()

    async def wait(self) -> str:
        code = await self._process.wait()
        await self.http.close()
        return how_ended(code, log_end(self._log))


def log_end(log: Path) -> str:
    """Return the end of an engine's log: the part that is searched for the cause of its end."""
    return log.read_bytes()[-LOG_TAIL:].decode(errors="replace")


def session(url: str, connector: aiohttp.BaseConnector, **more: Any) -> aiohttp.ClientSession:
    """Return a session without limits of its own: its callers have them."""
    timeout = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout, read_bufsize=READ_BYTES, **more)


def how_ended(code: int, log: str) -> str:
    """Return how a process ended, with the last error in its log."""
    errors = [line.strip() for line in log.splitlines() if "Error: " in line or "not whole" in line]
    if code < 0:
        return f"signal {-code}"
    return f"exit code {code}; {errors[-1][:300]}" if errors and code else f"exit code {code}"
