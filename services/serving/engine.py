"""One engine that answers requests, as the gateway sees it: a process that is started again when it dies.

    starting ─► up ─┬─► drains ─► changes its release ─► up
        ▲           └─► dead
        └───────────────┘        (with the release that the pool serves by then)

A request holds one engine from its start to the end of its answer. An engine changes its release when it holds no
request, so an answer has one release.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp

from sdft.actors.config import EngineSettings
from sdft.services.serving.host import EngineProcess, Host, NotStarted

AGAIN_S = (0.0, 1.0, 5.0, 15.0, 60.0)  # pauses before a start after so many failed ones
POLL_S = 0.1
STOP_S = 10.0  # for a killed process to end
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
        host: Host,
        logs: Path,
        settings: Callable[[Weights], EngineSettings],
        wanted: Callable[["ServingEngine"], Weights],
        model_name: str,
        tool_parser: str | None,
        start_timeout_s: float,
        changed: Callable[[], None],
        notice: Callable[[str], None],
    ) -> None:
        """logs: a folder. settings(): those of a process.

        wanted(engine): the weights that a process starts with. changed() is called when the engine can take a request,
        or not any more.
        """
        self.name = name
        self.in_flight = 0
        self.draining = False
        self.starts = 0
        self.losses = 0  # ends of processes that were up
        self._host, self._settings, self._wanted = host, settings, wanted
        self._log = logs / f"{name.replace(' ', '-')}.log"
        self._model_name, self._tool_parser, self._start_timeout_s = model_name, tool_parser, start_timeout_s
        self._changed, self._notice = changed, notice
        self._loaded: Weights | None = None  # by the process; None: it is not up
        self._doubted = asyncio.Event()  # a request has lost its connection
        self._process: EngineProcess | None = None

    @property
    def weights(self) -> Weights | None:
        """What it serves; None: it is not up, or it is not known whether it is."""
        return None if self._doubted.is_set() else self._loaded

    @property
    def down(self) -> bool:
        """Whether its process is not up: it starts with what the pool wants by then."""
        return self._loaded is None

    @property
    def free(self) -> bool:
        """Whether it takes requests."""
        return self.weights is not None and not self.draining

    @property
    def http(self) -> aiohttp.ClientSession:
        if self._process is None or self._process.http.closed:
            raise aiohttp.ClientConnectionError(f"{self.name} is not up")
        return self._process.http

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def place(self) -> str:
        """Where its process runs, for people."""
        return "" if self._process is None else self._process.place

    async def run(self) -> None:
        """Start the process, again whenever it ends, until cancelled."""
        failures = 0
        try:
            while True:
                await asyncio.sleep(AGAIN_S[min(failures, len(AGAIN_S) - 1)])
                since = asyncio.get_running_loop().time()
                weights = self._wanted(self)
                try:
                    process = await self._start(weights)
                except NotStarted as error:
                    failures += 1
                    self._notice(f"{self.name} could not be started: {error}; it is tried again")
                    continue
                ready = await self._answers(process)
                if ready and self._wanted(self).release != weights.release:
                    process.kill()  # the pool has changed its release meanwhile
                elif ready:
                    self._loaded, failures = weights, 0
                    self._doubted.clear()
                    self._changed()
                    took = asyncio.get_running_loop().time() - since
                    self._notice(f"{self.name} serves release {weights.release} ({took:.0f} s to start)")
                    await self._watch(process)
                elif process.running:
                    self._notice(f"{self.name} did not start within {self._start_timeout_s:g} s; {self._log}")
                    process.kill()
                self.losses += ready
                self._loaded = None
                how = await process.wait()
                failures += not ready
                self._notice(f"{self.name} ended ({how}); it is started again")
        finally:
            await self.stop()

    async def _watch(self, process: EngineProcess) -> None:
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

    async def _start(self, weights: Weights) -> EngineProcess:
        """Start a process. Raises NotStarted."""
        self.starts += 1
        given = {
            "engine": asdict(self._settings(weights)),
            "name": self._model_name,
            "tool_parser": self._tool_parser,
            "release": weights.release,
            "files": weights.files,
        }
        self._process = await self._host.start(self.name, given, self._log)
        return self._process

    async def _answers(self, process: EngineProcess) -> bool:
        """Wait until the process answers. Returns whether it does; else it has ended, or its time is over."""
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while process.running:
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
        if self._process is not None and self._process.running:
            self._process.kill()

    async def stop(self) -> None:
        self.kill()
        if self._process is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._process.wait()
