"""The processes of an environment, and the episodes that they run.

    room(n) ─► begin(record) ─► the process with the fewest episodes ─► reset ─► step ─► ... ─► close

A process that does not answer in time is killed, and another one takes its place. The episodes that it ran are lost:
each of them says why.
"""

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from sdft.services.config.environment import EnvironmentConfig
from sdft.services.environments.base import Done

START_S = 60.0
GRACE_S = 10.0  # beyond step_timeout_s, which the process itself keeps unless the user's code blocks it
LINE_BYTES = 64 << 20
SAID_LINES = 5  # last lines of the error output that explain the end of a process


class EpisodeLost(Exception):
    """An episode cannot go on. The message says why."""


class Environments:
    """The episodes of one environment."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._config = config
        self._processes: list[_Process | None] = [None] * config.processes
        self._starting = [asyncio.Lock() for _ in range(config.processes)]
        self._held = [0] * config.processes  # episodes of each
        self._running, self._changed = 0, asyncio.Condition()
        self._made = 0

    @asynccontextmanager
    async def room(self, episodes: int) -> AsyncIterator[None]:
        """Hold room for so many episodes, at most `concurrent`, once it is there: all of it at once."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._running + episodes <= self._config.concurrent)
            self._running += episodes
        try:
            yield
        finally:
            async with self._changed:
                self._running -= episodes
                self._changed.notify_all()

    async def begin(self, record: Mapping[str, Any]) -> "Episode":
        """Begin an episode, in the process with the fewest; its caller closes it. Raises EpisodeLost."""
        at = min(range(len(self._held)), key=self._held.__getitem__)
        self._held[at] += 1
        try:
            process = await self._process(at)
            self._made += 1
            episode = Episode(process, self._made, lambda: self._leave(at))
            await episode.reset(record)
        except BaseException:
            self._leave(at)
            raise
        return episode

    def _leave(self, at: int) -> None:
        self._held[at] -= 1

    async def stop(self) -> None:
        """End the processes."""
        await asyncio.gather(*(process.end() for process in self._processes if process is not None))

    async def _process(self, at: int) -> "_Process":
        async with self._starting[at]:
            process = self._processes[at]
            if process is None or process.ended:
                if process is not None:
                    await process.end()
                process = self._processes[at] = await _Process.start(self._config)
            return process


class Episode:
    """One episode."""

    def __init__(self, process: "_Process", number: int, ended: Callable[[], None]) -> None:
        self._process, self._number, self._ended = process, number, ended

    async def reset(self, record: Mapping[str, Any]) -> None:
        """Begin it. Raises EpisodeLost."""
        await self._call("reset", dict(record))

    async def step(self, reply: str) -> list[dict[str, Any]] | Done:
        """Return the messages that answer a reply, or the end. Raises EpisodeLost."""
        made = await self._call("step", reply)
        if "done" in made:
            return Done(**made["done"])
        return list(made["messages"])

    async def close(self) -> None:
        """End it, once."""
        self._ended()
        if not self._process.ended:
            with suppress(EpisodeLost):
                await self._call("close", None)

    async def _call(self, what: str, value: Any) -> dict[str, Any]:
        made = await self._process.call(what, self._number, value)
        if "lost" in made:
            raise EpisodeLost(made["lost"])
        return made


class _Process:
    """One process, and the calls that it has not answered."""

    def __init__(self, process: asyncio.subprocess.Process, limit_s: float) -> None:
        self._process, self._limit_s = process, limit_s
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._said: deque[str] = deque(maxlen=SAID_LINES)
        self._why: str | None = None  # it was killed
        self._reading = [asyncio.create_task(self._read()), asyncio.create_task(self._hear())]
        self.ready = asyncio.Event()

    @classmethod
    async def start(cls, config: EnvironmentConfig) -> "_Process":
        """Start a process. Raises EpisodeLost if it does not come up."""
        given = config.model_dump(include={"type", "settings", "step_timeout_s", "max_answer_chars"})
        pipe = asyncio.subprocess.PIPE
        words = (sys.executable, "-m", "sdft.services.environments.process", json.dumps(given))
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        made = cls(
            await asyncio.create_subprocess_exec(
                *words, stdin=pipe, stdout=pipe, stderr=pipe, limit=LINE_BYTES, env=environment
            ),
            config.step_timeout_s + GRACE_S,
        )
        try:
            async with asyncio.timeout(START_S):
                await made.ready.wait()
        except TimeoutError:
            await made.end()
            raise EpisodeLost(f"the environment's process did not start within {START_S:g} s") from None
        return made

    @property
    def ended(self) -> bool:
        return self._reading[0].done()

    async def call(self, what: str, episode: int, value: Any) -> dict[str, Any]:
        """Return the result of a call. Raises EpisodeLost if the process ends, or does not answer in time."""
        if self.ended or self._process.stdin is None:
            raise EpisodeLost(self._cause())
        self._number += 1
        number = self._number
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        line = json.dumps({"number": number, "what": what, "episode": episode, "value": value})
        try:
            self._process.stdin.write(line.encode() + b"\n")
            async with asyncio.timeout(self._limit_s):
                return await answer
        except TimeoutError:
            self._kill(f"the environment blocked its process for {self._limit_s:g} s in {what}")
            raise EpisodeLost(self._cause()) from None
        finally:
            self._calls.pop(number, None)

    async def end(self) -> None:
        self._kill("the run has ended")
        await self._process.wait()
        await asyncio.wait(self._reading)

    def _kill(self, why: str) -> None:
        if self._why is None:
            self._why = why
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while line := await self._process.stdout.readline():
                made = json.loads(line)
                if made.pop("ready", False):
                    self.ready.set()
                elif (call := self._calls.get(made.pop("n"))) is not None and not call.done():
                    call.set_result(made)
        finally:
            await self._process.wait()
            self.ready.set()
            for call in self._calls.values():
                if not call.done():
                    call.set_exception(EpisodeLost(self._cause()))

    async def _hear(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            self._said.append(line.decode(errors="replace").rstrip())

    def _cause(self) -> str:
        if self._why is not None:
            return self._why
        said = f": {self._said[-1]}" if self._said else ""
        return f"the environment's process ended with exit code {self._process.returncode}{said}"
