"""One engine that answers requests, as the gateway sees it: a process that is started again when it dies.

    starting ─► up ─┬─► drains ─► changes its release ─► up
        ▲           └─► dead
        └───────────────┘        (with the release that the pool serves by then)

A request holds one engine from its start to the end of its answer. An engine changes its release when it holds no
request, so an answer has one release.
"""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import aiohttp

from sdft.actors.config import EngineSettings
from sdft.actors.shared.process import die_with_parent

AGAIN_S = (0.0, 1.0, 5.0, 15.0, 60.0)  # pauses before a start after so many failed ones
LOG_TAIL = 4096  # bytes of an engine's log that are searched for the cause of its end
POLL_S = 0.1
CHECK_EVERY_S, HEALTH_S = 10.0, 20.0  # between two health checks; limit of one


@dataclass(frozen=True)
class Weights:
    """A release, as an engine loads it."""

    release: int
    folder: Path
    files: dict[str, str]
    step: str  # the weight version, as answers name it


class NotChanged(Exception):
    """An engine does not serve a release.

    refused: its files are damaged, or its log-probs are not those of the weights; else the engine was lost.
    """

    def __init__(self, text: str, refused: bool) -> None:
        super().__init__(text)
        self.refused = refused


class ServingEngine:
    """One engine: a name, and one process after another."""

    def __init__(
        self,
        name: str,
        sockets: Path,
        logs: Path,
        settings: Callable[[Weights], EngineSettings],
        served: Callable[[], Weights],
        program: Sequence[str],
        model_name: str,
        tool_parser: str | None,
        start_timeout_s: float,
        changed: Callable[[], None],
        notice: Callable[[str], None],
    ) -> None:
        """sockets, logs: folders. program: the command line of a process. settings(): those of a process.

        served(): the weights that a process starts with. changed() is called when the engine can take a request, or
        not any more.
        """
        self.name = name
        self.in_flight = 0
        self.draining = False
        self.starts = 0
        self._sockets, self._settings, self._served, self._program = sockets, settings, served, program
        self._log = logs / f"{name.replace(' ', '-')}.log"
        self._model_name, self._tool_parser, self._start_timeout_s = model_name, tool_parser, start_timeout_s
        self._changed, self._notice = changed, notice
        self._loaded: Weights | None = None  # by the process; None: it is not up
        self._doubted = asyncio.Event()  # a request has lost its connection
        self._process: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None

    @property
    def weights(self) -> Weights | None:
        """What it serves; None: it is not up, or it is not known whether it is."""
        return None if self._doubted.is_set() else self._loaded

    @property
    def free(self) -> bool:
        """Whether it takes requests."""
        return self.weights is not None and not self.draining

    @property
    def http(self) -> aiohttp.ClientSession:
        if self._http is None:
            raise aiohttp.ClientConnectionError(f"{self.name} is not up")
        return self._http

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        """Start the process, again whenever it ends, until cancelled."""
        failures = 0
        try:
            while True:
                await asyncio.sleep(AGAIN_S[min(failures, len(AGAIN_S) - 1)])
                since = asyncio.get_running_loop().time()
                weights, log = self._served(), self._log
                with log.open("ab") as file:
                    process = await self._start(weights, file)
                    ready = await self._answers(process)
                    if ready and self._served().release != weights.release:
                        process.kill()  # the pool has changed its release meanwhile
                    elif ready:
                        self._loaded, failures = weights, 0
                        self._doubted.clear()
                        self._changed()
                        took = asyncio.get_running_loop().time() - since
                        self._notice(f"{self.name} serves release {weights.release} ({took:.0f} s to start)")
                        await self._watch(process)
                    elif process.returncode is None:
                        self._notice(f"{self.name} did not start within {self._start_timeout_s:g} s; {log}")
                        process.kill()
                    await process.wait()
                self._loaded = None
                failures += not ready
                self._notice(f"{self.name} ended ({_cause(log, process.returncode)}); it is started again")
        finally:
            await self.stop()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Return when the process has ended; kill it if it answers nothing."""
        ended = asyncio.create_task(process.wait())
        try:
            while not ended.done():
                doubted = asyncio.create_task(self._doubted.wait())
                await asyncio.wait([ended, doubted], timeout=CHECK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                doubted.cancel()
                if ended.done():
                    return
                if not await self._healthy():
                    self._notice(f"{self.name} does not answer; it is killed")
                    self.kill()
                elif self._doubted.is_set():
                    self._doubted.clear()
                    self._changed()
        finally:
            ended.cancel()

    async def _healthy(self) -> bool:
        try:
            async with asyncio.timeout(HEALTH_S), self.http.get("/health") as reply:
                return reply.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    def doubt(self) -> None:
        """Send no further requests until it is known whether the process lives: one has lost its connection."""
        self._doubted.set()

    async def _start(self, weights: Weights, log: IO[bytes]) -> asyncio.subprocess.Process:
        self.starts += 1
        socket = self._sockets / f"{self.name.replace(' ', '-')}.sock"
        socket.unlink(missing_ok=True)
        given = socket.with_suffix(".json")
        given.write_text(
            json.dumps(
                {
                    "engine": asdict(self._settings(weights)),
                    "socket": str(socket),
                    "name": self._model_name,
                    "tool_parser": self._tool_parser,
                    "release": weights.release,
                    "files": weights.files,
                }
            )
        )
        await self._disconnect()
        self._http = aiohttp.ClientSession(
            "http://engine",
            connector=aiohttp.UnixConnector(str(socket), limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=1 << 20,
        )
        self._process = await asyncio.create_subprocess_exec(
            *self._program,
            str(given),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Files that a killed engine leaves behind go with the folder.
            env=os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(self._sockets)},
            preexec_fn=die_with_parent,
        )
        return self._process

    async def _answers(self, process: asyncio.subprocess.Process) -> bool:
        """Wait until the process answers. Returns whether it does; else it has ended, or its time is over."""
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while process.returncode is None:
                    if await self._healthy():
                        return True
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            pass
        return False

    async def change(self, weights: Weights) -> float:
        """Load and verify a release; the engine must hold no request. Returns the probe's gap. Raises NotChanged."""
        given = {"release": weights.release, "folder": str(weights.folder), "files": weights.files}
        try:
            async with asyncio.timeout(self._start_timeout_s):
                async with self.http.post("/sdft/release", json=given) as reply:
                    made = await reply.json()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.kill()
            raise NotChanged(f"{self.name} did not answer ({type(error).__name__})", refused=False) from error
        if reply.status != 200:
            if reply.status != 409:  # its weights may be half loaded
                self.kill()
            raise NotChanged(f"{self.name} refused release {weights.release}: {made['error']}", refused=True)
        self._loaded = weights
        return float(made["gap"])

    def kill(self) -> None:
        """End the process; `run` starts another one."""
        self._loaded = None
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        self.kill()
        if self._process is not None:
            await self._process.wait()
        await self._disconnect()

    async def _disconnect(self) -> None:
        if self._http is not None:
            await self._http.close()
            self._http = None


def _cause(log: Path, code: int | None) -> str:
    """Return how a process ended, with the last error in its log."""
    text = log.read_bytes()[-LOG_TAIL:].decode(errors="replace")
    errors = [line.strip() for line in text.splitlines() if "Error: " in line or "not whole" in line]
    if code is not None and code < 0:
        return f"signal {-code}"
    return f"exit code {code}; {errors[-1][:300]}" if errors and code else f"exit code {code}"
