"""The run's side of turns: an engine of a window's run that is the engine of the service.

    EngineWorker ─► TurnEngine ─► socket ─► server.py ─► the engine, in the turn of this pool

The service names the socket in the environment (TURNS).
"""

import asyncio
import os
import pickle
from collections.abc import Sequence
from typing import Any

import aiohttp

from sdft.actors.config import TURNS, EngineSettings
from sdft.actors.engine import Engine
from sdft.actors.shared.types import (
    FloatArray,
    GenerateRequest,
    IntArray,
    Rollout,
    Sampling,
    Snapshot,
    TeacherScores,
    UpdateReport,
)
from sdft.services.serving.turns.server import PATH

AGAIN_S = 0.5  # between two tries to reach an engine that starts


class TurnEngine(Engine):
    """The engine of a service, for one pool of a window's run."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self._socket = os.environ.get(TURNS, "")
        self._http: aiohttp.ClientSession | None = None
        self._process: int | None = None  # of the engine, once it has answered
        self._lost = False

    async def start(self) -> None:
        """Wait for the service's engine. It loads the model folder before its first call without an update.

        Raises RuntimeError if this process does not belong to a service.
        """
        if not self._socket:
            raise RuntimeError(
                f"the run of a window uses the engine of its service, which `sdft serve` starts; to run it alone, set "
                f"actors.{self.settings.pool}.engine: vllm"
            )
        while True:
            try:
                self._process = await self._call("begin", self.settings.model)
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(AGAIN_S)
            else:
                self._lost = False
                return

    async def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        rollouts: list[Rollout] = await self._call("generate", list(requests), sampling)
        return rollouts

    async def score(
        self, pairs: Sequence[tuple[IntArray, IntArray]], k: int, temperature: float = 1.0
    ) -> list[TeacherScores]:
        scores: list[TeacherScores] = await self._call("score", list(pairs), k, temperature)
        return scores

    async def score_at(
        self, items: Sequence[tuple[IntArray, IntArray, IntArray]], k: int, temperature: float = 1.0
    ) -> list[TeacherScores]:
        scores: list[TeacherScores] = await self._call("score_at", list(items), k, temperature)
        return scores

    async def probe(self, ids: IntArray) -> FloatArray:
        logprobs: FloatArray = await self._call("probe", ids)
        return logprobs

    async def update_weights(self, snapshot: Snapshot) -> UpdateReport:
        report: UpdateReport = await self._call("update", snapshot)
        return report

    async def ping(self) -> None:
        await self._call("ping")

    @property
    def dead(self) -> bool:
        """Whether the connection was lost. This process then ends, and another one waits for the service's engine."""
        return self._lost

    def stop(self) -> None:
        """Free the pool's weights in the service's engine."""

        async def forget() -> None:
            async with self._session() as http:  # that of `_call` belongs to another loop
                await self._posted(http, "forget")

        try:
            asyncio.run(forget())
        except (aiohttp.ClientError, OSError):
            return  # its process has ended, and the weights with it

    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.UnixConnector(self._socket, limit=0)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))

    async def _call(self, method: str, *arguments: Any) -> Any:
        """As `_posted`, on a connection that stays."""
        if self._http is None:
            self._http = self._session()
        return await self._posted(self._http, method, *arguments)

    async def _posted(self, http: aiohttp.ClientSession, method: str, *arguments: Any) -> Any:
        """Return what the engine's method returns, or raise its exception. Raises a ClientError if it is lost."""
        body = pickle.dumps((self._process, self.settings.pool, method, arguments))
        try:
            async with http.post(f"http://engine{PATH}", data=body) as reply:
                reply.raise_for_status()
                answered, result = pickle.loads(await reply.read())
        except (aiohttp.ClientError, OSError):
            self._lost = True
            raise
        if not answered:
            raise result
        return result
