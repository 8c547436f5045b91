"""One process of environments, as its parent sees it: calls that it answers, and its end.

A process that answers nothing for `step_timeout_s` and GRACE_S is killed, with all that it has started: the user's code
blocks it, because the process itself ends a step after `step_timeout_s`.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import sdft
from sdft.services.config.environment import EnvironmentConfig
from sdft.services.environments import elsewhere

START_S = 180.0
GRACE_S = 10.0
END_S = 10.0  # for a killed process
POLL_S = 0.1
LINE_BYTES = 64 << 20
SAID_BYTES = 4096  # end of the error output, which explains the end of a process


def command(config: EnvironmentConfig, check: bool = False) -> tuple[str, ...]:
    """Return the command line of a process. check: it only makes one object of the class, and ends."""
    names = {"type", "settings", "step_timeout_s", "max_answer_chars"}
    given = json.dumps(config.model_dump(mode="json", include=names) | ({"check": True} if check else {}))
    if config.python is None:
        return sys.executable, "-m", "sdft.services.environments.process", given
    return config.python, elsewhere.__file__, str(Path(sdft.__file__).parent), given


class EpisodeLost(Exception):
    """An episode cannot go on. The message says why."""


class EnvironmentProcess:
    """One process, and the calls that it has not answered."""

    def __init__(self, process: asyncio.subprocess.Process, said: IO[bytes], limit_s: float) -> None:
        self._process, self._said, self._limit_s = process, said, limit_s
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._why: str | None = None  # it was killed
        self._answered = 0.0  # time of its last answer
        self.ready = asyncio.Event()
        self._reading = asyncio.create_task(self._read())
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, config: EnvironmentConfig) -> "EnvironmentProcess":
        """Start a process. Raises EpisodeLost if it does not come up."""
        said = tempfile.TemporaryFile()  # noqa: SIM115 - the process has it, too. A pipe may be held by what it starts
        try:
            process = await asyncio.create_subprocess_exec(
                *command(config),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=said,
                limit=LINE_BYTES,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        except OSError as error:
            raise EpisodeLost(f"the environment's process could not be started: {error}") from None
        made = cls(process, said, config.step_timeout_s + GRACE_S)
        try:
            async with asyncio.timeout(START_S):
                await made.ready.wait()
        except TimeoutError:
            await made.end()
            raise EpisodeLost(f"the environment's process did not start within {START_S:g} s") from None
        except BaseException:
            made.kill("the run has ended")
            raise
        return made

    @property
    def ended(self) -> bool:
        return self._watching.done()

    def send(self, what: str, episode: int, value: Any) -> int:
        """Send a call, and return its number. Raises EpisodeLost for a value that JSON cannot hold."""
        self._number += 1
        try:
            line = json.dumps({"number": self._number, "what": what, "episode": episode, "value": value})
        except (TypeError, ValueError) as error:
            raise EpisodeLost(f"a column of the row is no JSON: {error}") from None
        if self._process.stdin is not None and not self.ended:
            self._process.stdin.write(line.encode() + b"\n")
        return self._number

    async def call(self, what: str, episode: int, value: Any) -> dict[str, Any]:
        """Return the result of a call. Raises EpisodeLost if the process ends, or answers no call in time."""
        if self.ended:
            raise EpisodeLost(self._cause())
        number, clock = self.send(what, episode, value), asyncio.get_running_loop()
        answer = self._calls[number] = clock.create_future()
        self._answered = max(self._answered, clock.time()) if len(self._calls) == 1 else self._answered
        try:
            while not answer.done():
                left = self._answered + self._limit_s - clock.time()
                if left <= 0:
                    self.kill(f"the environment blocked its process for {self._limit_s:g} s in {what}")
                    raise EpisodeLost(self._cause())
                await asyncio.wait([answer], timeout=left)
            return answer.result()
        finally:
            self._calls.pop(number, None)

    async def end(self) -> None:
        """Kill it, and wait for its end."""
        self.kill("the run has ended")
        await asyncio.wait([self._watching], timeout=END_S)
        self._reading.cancel()

    def kill(self, why: str) -> None:
        """Kill it and what it has started. why: for the episodes that are lost."""
        if self._why is None:
            self._why = why
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            made = json.loads(line)
            self._answered = asyncio.get_running_loop().time()
            if made.pop("ready", False):
                self.ready.set()
            elif (call := self._calls.get(made.pop("n"))) is not None and not call.done():
                call.set_result(made)

    async def _watch(self) -> None:
        """Wait for the end of the process itself: what it has started may hold its pipes."""
        while self._process.returncode is None:
            await asyncio.sleep(POLL_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.wait([self._reading], timeout=1)  # what it had answered
        for call in self._calls.values():
            if not call.done():
                call.set_exception(EpisodeLost(self._cause()))
        self.ready.set()

    def _cause(self) -> str:
        if self._why is not None:
            return self._why
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - SAID_BYTES))
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        return f"the environment's process ended with exit code {self._process.returncode}{said}"
