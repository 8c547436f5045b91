"""An environment of the library `verifiers` (versions 0.1 to 0.3, whose environments are made by `load_environment`).

    rollout of verifiers ─► its client gets the prompt ─► the new messages answer the student's last reply
             ▲                                                                │
             └────────────── the client returns the student's next reply ◄────┘
    end of the rollout ─► reward ─► Done

The library's own rollout runs, so that its stop conditions, tools and rubric are those of an evaluation with it. Only
the model is replaced: by a client that waits for the student. The library is imported in the environment's process,
which may have an interpreter of its own (`environment.python`).
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from sdft.actors.shared.own_code import NotImportable
from sdft.services.environments.base import Answer, Done, Dropped, Environment

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Verifiers(Environment):
    """An episode of an environment of `verifiers`."""

    def __init__(self, environment: str, arguments: Mapping[str, Any] | None = None, passes_at: float = 1.0) -> None:
        """environment: its name, as for load_environment. arguments: those of its load_environment.

        passes_at: least reward of an episode that has passed. NotImportable without the library.
        """
        _library()
        self._name, self._arguments, self._passes_at = environment, json.dumps(arguments or {}), passes_at
        self._asked: asyncio.Queue[list[dict[str, Any]]] = asyncio.Queue()  # prompts that the rollout waits with
        self._reply: asyncio.Future[str] | None = None
        self._rollout: asyncio.Task[Any] | None = None
        self._seen: list[dict[str, Any]] = []  # the conversation so far, as the rollout shows it

    @classmethod
    def prepare(cls, settings: Mapping[str, Any]) -> None:
        """Load the environment."""
        _loaded(settings["environment"], json.dumps(settings.get("arguments") or {}))

    async def reset(self, record: Mapping[str, Any]) -> None:
        """Begin the rollout of a row: prompt, answer and info. ValueError if it asks something else than the row."""
        loaded = _loaded(self._name, self._arguments)
        given = {"prompt": record["prompt"], "answer": record.get("answer") or "", "info": record.get("info") or {}}
        given["example_id"] = record.get("example_id", 0)
        work = loaded.run_rollout(given, _client(self._ask), "student", {}, state_columns=["stop_condition"])
        self._rollout = asyncio.create_task(work)
        prompt = await self._next()
        if prompt is None:
            raise ValueError(f"the rollout ended before its first reply: {_ending(self._rollout.result())}")
        if _texts(prompt) != _texts(record["prompt"]):
            raise ValueError("the environment's first prompt is not that of the row; take the rows from its data set")
        self._seen = prompt

    async def step(self, reply: str) -> Answer | Done:
        """Give the reply to the rollout, and return the messages that it adds. Dropped if it rewrites earlier ones."""
        assert self._reply is not None
        assert self._rollout is not None
        self._reply.set_result(reply)
        prompt = await self._next()
        if prompt is None:
            output = self._rollout.result()
            if output.get("error"):
                raise Dropped(f"verifiers: {_ending(output)}")
            reward = float(output["reward"] or 0.0)
            return Done(reward >= self._passes_at, f"reward {reward:g}")
        before = len(self._seen)
        if _texts(prompt[:before]) != _texts(self._seen) or prompt[before]["role"] != "assistant":
            raise Dropped("verifiers: the environment rewrites earlier messages, and sampled tokens cannot change")
        self._seen = prompt
        return [message for message in prompt[before + 1 :] if message["role"] != "assistant"]

    async def close(self) -> None:
        """End the rollout."""
        if self._rollout is not None:
            self._rollout.cancel()
            with suppress(asyncio.CancelledError, Exception):  # its outcome is known, or not wanted
                await self._rollout

    async def _ask(self, prompt: list[dict[str, Any]]) -> str:
        """Wait for the student's reply to a prompt."""
        self._reply = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(prompt)
        return await self._reply

    async def _next(self) -> list[dict[str, Any]] | None:
        """Return the next prompt of the rollout; None: it has ended. Raises the rollout's error."""
        assert self._rollout is not None
        asked = asyncio.create_task(self._asked.get())
        try:
            await asyncio.wait([asked, self._rollout], return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            self._rollout.result()
            return None
        finally:
            asked.cancel()


def _library() -> Any:
    try:
        import verifiers
    except ImportError as error:
        raise NotImportable(
            f"the library verifiers cannot be imported ({error}); install verifiers<0.4 in an environment of its own, "
            f"and set environment.python to its interpreter"
        ) from None
    if not hasattr(verifiers, "load_environment"):
        raise NotImportable("this version of verifiers has no load_environment; install verifiers<0.4")
    return verifiers


@cache
def _loaded(name: str, arguments: str) -> Any:
    return _library().load_environment(name, **json.loads(arguments))


def _client(ask: Any) -> Any:
    """Return a client of verifiers whose answers are those of ask(prompt)."""
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage, ToolCall

    class Student(Client):
        def __init__(self) -> None:
            super().__init__(None)

        async def get_response(self, prompt: Any, model: str, *_: Any, **__: Any) -> Response:
            text = await ask([_plain(message) for message in prompt])
            calls = [
                ToolCall(id=f"call_{i}", name=call["name"], arguments=json.dumps(call.get("arguments", {})))
                for i, call in enumerate(_calls(text))
            ]
            finish = "tool_calls" if calls else "stop"
            message = ResponseMessage(
                content=text, tool_calls=calls or None, finish_reason=finish, is_truncated=False, tokens=None
            )
            return Response(id="student", created=int(time.time()), model=model, message=message)

        def setup_client(self, config: Any) -> Any: ...

        async def to_native_tool(self, tool: Any) -> Any: ...

        async def to_native_prompt(self, messages: Any) -> Any: ...

        async def get_native_response(self, *_: Any, **__: Any) -> Any: ...

        async def raise_from_native_response(self, response: Any) -> None: ...

        async def from_native_response(self, response: Any) -> Any: ...

        async def close(self) -> None: ...

    return Student()


def _calls(text: str) -> list[dict[str, Any]]:
    """Return the tool calls between the tags of Hermes and Qwen; one that is no JSON object is left in the text."""
    found = []
    for inside in CALL.findall(text):
        with suppress(ValueError):
            call = json.loads(inside)
            if isinstance(call, dict) and isinstance(call.get("name"), str):
                found.append(call)
    return found


def _plain(message: Any) -> dict[str, Any]:
    """Return a message as a dictionary with its text."""
    given = message if isinstance(message, dict) else message.model_dump(exclude_none=True)
    kept = {key: given[key] for key in ("tool_call_id", "name") if given.get(key)}
    return {"role": given["role"], "content": _text(given.get("content"))} | kept


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content or ""


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], _text(message.get("content"))) for message in messages]


def _ending(output: Mapping[str, Any]) -> str:
    return str(output.get("error") or output.get("stop_condition") or "no reason is given")
