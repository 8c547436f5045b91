"""The process of environments: many episodes at once, one object each.

    python -m sdft.services.environments.process '{"type": "my.module:House", "settings": {}, ...}'

It reads calls as lines of JSON from its input and writes their results as lines to its output. What the user's code
prints goes to the error output.
"""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from sdft.actors.shared.process import die_with_parent
from sdft.services.environments.base import Done, Environment
from sdft.services.environments.named import environment_class

ROLES = ("user", "tool")
CUT = "\n[cut: the answer has {} characters]"
LINE_BYTES = 64 << 20


class Episodes:
    """The episodes of this process, by number."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._class = environment_class(given["type"])
        self._settings: dict[str, Any] = given["settings"]
        self._timeout_s: float = given["step_timeout_s"]
        self._longest: int = given["max_answer_chars"]
        self._episodes: dict[int, Environment] = {}

    async def call(self, what: str, episode: int, value: Any) -> dict[str, Any]:
        """Return the result of a call as JSON: messages, done, or lost, which ends the episode."""
        if what == "reset":
            try:
                made = self._class(**self._settings)
                async with asyncio.timeout(self._timeout_s):
                    await made.reset(value)
            except Exception as error:  # noqa: BLE001 - a user's code: it can raise anything
                return {"lost": f"reset failed: {_said(error)}"}
            self._episodes[episode] = made
            return {}
        if what == "close":
            environment = self._episodes.pop(episode, None)
            if environment is not None:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await environment.close()
                except Exception as error:  # noqa: BLE001 - as above
                    print(f"close failed: {_said(error)}", file=sys.stderr, flush=True)
            return {}
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._episodes[episode].step(value)
            return self._shown(answer)
        except TimeoutError:
            return self._told(f"no answer within {self._timeout_s:g} s")
        except Exception as error:  # noqa: BLE001 - as above; the student sees it
            return self._told(_said(error))

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
        return text if len(text) <= self._longest else text[: self._longest] + CUT.format(len(text))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


async def serve(given: Mapping[str, Any], output: int) -> None:
    """Answer calls until the input ends. output: file descriptor for the results."""
    episodes, running = Episodes(given), set[asyncio.Task[None]]()
    reader = asyncio.StreamReader(limit=LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

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
    die_with_parent()
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the user's code prints
    os.write(output, b'{"ready": true}\n')
    asyncio.run(serve(json.loads(sys.argv[1]), output))


if __name__ == "__main__":
    main()
