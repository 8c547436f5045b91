"""The process of environments: many episodes at once, one object each.

    python -m sdft.services.environments.process '{"type": "my.module:House", "settings": {}, ...}'

It reads calls as lines of JSON from its input and writes their results as lines to its output. The user's code, and
what it starts, has neither of the two: its input is empty, and what it prints goes to the error output.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from sdft.actors.shared.process import die_with_parent
from sdft.services.environments.base import Done, Dropped, Environment
from sdft.services.environments.named import environment_class

ROLES = ("user", "tool")
CUT = "\n[cut: the answer has {} characters]"
LINE_BYTES = 64 << 20


class Episodes:
    """The episodes of this process, by number."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._class = environment_class(given["type"])
        self._settings: dict[str, Any] = given["settings"]
        self._class.prepare(self._settings)
        self._timeout_s: float = given["step_timeout_s"]
        self._longest: int = given["max_answer_chars"]
        self._episodes: dict[int, Environment] = {}

    async def call(self, what: str, episode: int, value: Any) -> dict[str, Any]:
        """Return the result of a call as JSON: messages, done, or lost, which ends the episode."""
        if what == "reset":
            return await self._begin(episode, value)
        if what == "close":
            await self._close(self._episodes.pop(episode, None))
            return {}
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._episodes[episode].step(value)
            return self._shown(answer)
        except Dropped as dropped:
            return {"lost": str(dropped)}
        except TimeoutError:
            return self._told(f"no answer within {self._timeout_s:g} s")
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - a user's code; the student sees it
            return self._told(_said(error))

    async def _begin(self, episode: int, record: Any) -> dict[str, Any]:
        made = None
        try:
            made = self._class(**self._settings)
            async with asyncio.timeout(self._timeout_s):
                await made.reset(record)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - a user's code: it can raise anything
            await self._close(made)
            return {"lost": f"reset failed: {_said(error)}"}
        self._episodes[episode] = made
        return {}

    async def _close(self, environment: Environment | None) -> None:
        if environment is None:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await environment.close()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - as above
            print(f"close failed: {_said(error)}", file=sys.stderr, flush=True)

    def _shown(self, answer: Any) -> dict[str, Any]:
        if isinstance(answer, Done):
            return {"done": {"passed": bool(answer.passed), "feedback": self._cut(str(answer.feedback))}}
        if isinstance(answer, str):
            return self._told(answer)
        messages = []
        for message in answer:
            role, content = message["role"], message["content"]
            if role not in ROLES or not isinstance(content, str):
                raise TypeError(f"a message must have the role user or tool and text as content, not {message!r}")
            messages.append(dict(message) | {"content": self._cut(content)})
        if not messages:
            raise TypeError("the environment returned no message")
        return {"messages": messages}

    def _told(self, text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": self._cut(text)}]}

    def _cut(self, text: str) -> str:
        text = text.encode(errors="replace").decode()  # half a surrogate pair, as in names of files, has no tokens
        return text if len(text) <= self._longest else text[: self._longest] + CUT.format(len(text))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


async def serve(given: Mapping[str, Any], calls: int, output: int) -> None:
    """Answer calls until they end. calls, output: file descriptors of the calls and of their results."""
    episodes, running = Episodes(given), set[asyncio.Task[None]]()
    reader = asyncio.StreamReader(limit=LINE_BYTES)
    pipe = os.fdopen(calls, "rb", buffering=0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    os.write(output, b'{"ready": true}\n')

    async def one(number: int, what: str, episode: int, value: Any) -> None:
        result = await episodes.call(what, episode, value)
        try:
            line = json.dumps(result | {"n": number})
        except (ValueError, TypeError) as error:
            line = json.dumps({"n": number, "lost": f"the answer is no JSON: {error}"})
        data = memoryview(line.encode() + b"\n")
        while data:
            data = data[os.write(output, data) :]

    while line := await reader.readline():
        task = asyncio.create_task(one(**json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)


def main() -> None:
    given = json.loads(sys.argv[1])
    if given.get("check"):
        environment_class(given["type"])(**given["settings"])
        return
    die_with_parent()
    calls, output = os.dup(sys.stdin.fileno()), os.dup(sys.stdout.fileno())
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the user's code prints
    asyncio.run(serve(given, calls, output))


if __name__ == "__main__":
    main()
