"""The processes of an environment, and the episodes that they run.

    room(n) ─► begin(record) ─► the process with the fewest episodes ─► reset ─► step ─► ... ─► close

A process that does not answer in time is killed, and another one takes its place. The episodes that it ran are lost:
each of them says why.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from sdft.services.config.environment import EnvironmentConfig
from sdft.services.environments.base import Done
from sdft.services.environments.child import EnvironmentProcess, EpisodeLost


class Environments:
    """The episodes of one environment."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._config = config
        self._processes: list[EnvironmentProcess | None] = [None] * config.processes
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
        except BaseException:
            self._leave(at)
            raise
        self._made += 1
        episode = Episode(process, self._made, lambda: self._leave(at))
        try:
            await episode.reset(record)
        except BaseException:
            episode.forget()
            raise
        return episode

    def _leave(self, at: int) -> None:
        self._held[at] -= 1

    async def stop(self) -> None:
        """End the processes."""
        await asyncio.gather(*(process.end() for process in self._processes if process is not None))

    async def _process(self, at: int) -> EnvironmentProcess:
        async with self._starting[at]:
            process = self._processes[at]
            if process is None or process.ended:
                if process is not None:
                    await process.end()
                process = self._processes[at] = await EnvironmentProcess.start(self._config)
            return process


class Episode:
    """One episode."""

    def __init__(self, process: EnvironmentProcess, number: int, ended: Callable[[], None]) -> None:
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

    def forget(self) -> None:
        """End it without waiting for its end."""
        self._ended()
        self._process.send("close", self._number, None)

    async def _call(self, what: str, value: Any) -> dict[str, Any]:
        made = await self._process.call(what, self._number, value)
        if "lost" in made:
            raise EpisodeLost(made["lost"])
        return made
