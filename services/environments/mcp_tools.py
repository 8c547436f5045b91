"""The tools of an MCP server: an episode calls them until a reply has no call, which is its answer.

    reply with calls ─► server ─► results, as messages of the role tool
    reply without    ─► graded by the row's answer ─► Done

Each episode has a server of its own, a process that speaks the Model Context Protocol on its standard streams.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

from sdft.services.data.thoughts import without_thoughts
from sdft.services.environments.base import Answer, Done, Environment
from sdft.services.grading.graders import GRADERS
from sdft.services.grading.graders.tool_call import parse_calls

ACTION = "action"


@dataclass(frozen=True)
class Called:
    """A tool call in a reply."""

    name: str
    arguments: dict[str, Any]


class McpTools(Environment):
    """An episode with the tools of an MCP server."""

    def __init__(
        self,
        command: Sequence[str],
        grader: str = "contains",
        parser: str = ACTION,
        model: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """command: of the server. grader: the rule for the last reply. env: further variables of the server.

        parser: how calls are found in a reply: "action" (Action and Action Input lines), or the name of a parser of
        vLLM, such as hermes, which needs `model`, the folder of the model's tokenizer. ValueError for what is unknown.
        """
        if not command or isinstance(command, str):
            raise ValueError("command must be a list of words, such as [python, server.py]")
        if grader not in GRADERS:
            raise ValueError(f"grader must be one of {', '.join(GRADERS)}, not {grader}")
        if (parser == ACTION) != (model is None):
            raise ValueError("parser and model go together: a parser of vLLM, and the folder of the model")
        self._server = StdioServerParameters(command=command[0], args=list(command[1:]), env=dict(env or {}))
        self._grader, self._parser, self._model = GRADERS[grader], parser, model
        self._session: ClientSession | None = None
        self._ended = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    @classmethod
    def prepare(cls, settings: Mapping[str, Any]) -> None:
        """Load the parser."""
        _finder(settings.get("parser", ACTION), settings.get("model"))

    async def reset(self, record: Mapping[str, Any]) -> None:
        """Start the server. ValueError for a row whose answer the grader cannot use."""
        self._answer, self._tools = record["answer"], _definitions(record.get("tools"))
        if (problem := self._grader.check_answer(self._answer)) is not None:
            raise ValueError(f"answer: {problem}")
        ready: asyncio.Future[ClientSession] = asyncio.get_running_loop().create_future()
        # The client's contexts must be left by the task that has entered them.
        self._running = asyncio.create_task(self._run(ready))
        self._session = await ready
        self._find = _finder(self._parser, self._model)

    async def step(self, reply: str) -> Answer | Done:
        """Call the tools that a reply names, one after the other; without a call grade it."""
        assert self._session is not None
        calls = self._find(without_thoughts(reply), self._tools)
        if calls is None:
            return "the input of a call is not a JSON object"
        if not calls:
            text = without_thoughts(reply)
            return Done(self._grader.grade(text, self._answer), f"the answer was {text.strip()[:200]!r}")
        return [await self._called(self._session, call) for call in calls]

    async def close(self) -> None:
        """End the server."""
        self._ended.set()
        if self._running is None:
            return
        if self._session is None:  # it did not start
            self._running.cancel()
        await asyncio.wait([self._running])

    async def _run(self, ready: "asyncio.Future[ClientSession]") -> None:
        try:
            async with stdio_client(self._server) as streams, ClientSession(*streams) as session:
                await session.initialize()
                ready.set_result(session)
                await self._ended.wait()
        except Exception as error:  # noqa: BLE001 - whatever the server does, the episode is lost with the reason
            if not ready.done():
                ready.set_exception(error)

    async def _called(self, session: ClientSession, call: Called) -> dict[str, Any]:
        try:
            result: Any = await session.call_tool(call.name, call.arguments)
            texts = [part.text if hasattr(part, "text") else f"[{part.type}]" for part in result.content]
            said = "\n".join(texts)
        except Exception as error:  # noqa: BLE001 - whatever a server does wrong, the student sees it
            said = f"{type(error).__name__}: {error}"
        return {"role": "tool", "name": call.name, "content": said or "(nothing)"}


@cache
def _finder(parser: str, model: str | None) -> Callable[[str, Any], list[Called] | None]:
    """Return a function from a reply and the tools' definitions to the calls in it; None: one cannot be read."""
    if parser == ACTION:
        return _actions
    assert model is not None
    from sdft.actors.vllm.tool_calls import call_parser

    find = call_parser(parser, model)
    return lambda reply, tools: [Called(name, _object(given)) for name, given in find(reply, tools)]


def _actions(reply: str, _: Any) -> list[Called] | None:
    calls = parse_calls(reply)
    return None if calls is None else [Called(call.name, call.arguments) for call in calls]


def _definitions(tools: Any) -> Any:
    """Return the definitions of a row's tools in OpenAI's form; a row may have bare ones."""
    if not tools:
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _object(arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return arguments if isinstance(arguments, dict) else {}
