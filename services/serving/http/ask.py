"""Requests to the model: passed on to an engine, with the release, the weight version and a receipt in the answer.

    request ─► engine (waits for a free one) ─► answer, or its pieces as they come ─► receipt kept ─► end of the answer

An engine that dies before the first byte of an answer is no error: the request goes to another one. A client that goes
away ends its request.
"""

import asyncio
import json
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sdft.services.config.service import ServiceConfig
from sdft.services.releases.canary import is_chosen
from sdft.services.serving.engine import ServingEngine, Weights
from sdft.services.serving.http.errors import ApiError, error_event
from sdft.services.serving.http.metrics import times
from sdft.services.serving.http.requests import body_of, object_of_body
from sdft.services.serving.pool import EnginesBusy, ServingPool
from sdft.services.serving.receipts import Receipt, Receipts

TRIES = 3  # engines that a request is sent to, if one after the other dies
GONE = (aiohttp.ClientError, ConnectionError, OSError)
DONE = b"data: [DONE]"
CLIENT_GONE = 499  # the client has closed the connection
RELEASE, WEIGHTS, RECEIPT = "X-SDFT-Release", "X-SDFT-Weights", "X-SDFT-Receipt"
PREFIXES = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}  # of the ids that vLLM makes


class Asking:
    """Passes requests on to the engines."""

    def __init__(self, pool: ServingPool, receipts: Receipts | None, config: ServiceConfig) -> None:
        """receipts: None: none are kept."""
        self._pool, self._receipts, self._http, self._canary = pool, receipts, config.http, config.gate.canary
        self.answered = times("answer_seconds", "Seconds of answers with status 200, from request to end")
        self.first_piece = times("first_piece_seconds", "Seconds from a request to the first piece of its stream")
        self.failed = 0
        self._held = 0  # requests that are read, wait or are answered

    async def answer(self, request: Request) -> Response:
        """Pass a request on, and its answer back."""
        if self._held >= self._http.max_in_flight:
            raise ApiError(
                429,
                "too_many_requests",
                f"{self._http.max_in_flight} requests are in flight (service.http.max_in_flight); send it again later",
                retry_after_s=1,
            )
        with ExitStack() as held:
            self._held += 1
            held.callback(self._release)
            return await self._answer(request, held)

    def _release(self) -> None:
        self._held -= 1

    async def _answer(self, request: Request, held: ExitStack) -> Response:
        """held: what the request holds; a stream takes it over."""
        body = await body_of(request, self._http.max_body_mib)
        given = object_of_body(body)
        path, since, name = request.url.path, time.monotonic(), uuid.uuid4().hex
        user = _user(given) or name
        receipt = PREFIXES[path] + name if self._receipts is not None and path in PREFIXES else None
        asked = _Asked(path, body, given, name, since, since + self._http.request_timeout_s, receipt, user)
        for attempt in range(1, TRIES + 1):
            try:
                return await _unless_gone(request, self._try(asked, held))
            except EnginesBusy as error:
                self.failed += 1
                raise ApiError(503, "no_engine", f"{error}; send it again later", retry_after_s=5) from None
            except TimeoutError:
                self.failed += 1
                raise ApiError(
                    504,
                    "timeout",
                    f"no answer within {self._http.request_timeout_s:g} s (service.http.request_timeout_s)",
                ) from None
            except GONE as error:
                if attempt == TRIES:
                    self.failed += 1
                    raise ApiError(
                        503, "engine_lost", f"{TRIES} engines were lost while they answered", retry_after_s=5
                    ) from error
        raise AssertionError("unreachable")

    async def _try(self, asked: "_Asked", holding: ExitStack) -> Response:
        """Have one engine answer. Raises EnginesBusy, TimeoutError, or GONE if the engine is lost before it begins."""
        async with AsyncExitStack() as held:
            engine = await held.enter_async_context(self._pool.engine(asked.left_s, self._by_canary(asked)))
            if (weights := engine.weights) is None:  # it has died since it was chosen
                raise aiohttp.ClientConnectionError(f"{engine.name} is not up")
            headers = {"Content-Type": "application/json", "X-Request-Id": asked.name}
            try:
                async with asyncio.timeout(asked.left_s):
                    request = engine.http.post(asked.path, data=asked.body, headers=headers)
                    reply = await held.enter_async_context(request)
                    whole = "text/event-stream" not in reply.headers.get("Content-Type", "")
                    content = await reply.read() if whole else b""
            except TimeoutError:
                raise
            except GONE:
                engine.doubt()
                raise
            sent = {"Content-Type": reply.headers.get("Content-Type", "application/json")}
            sent |= {RELEASE: str(weights.release), WEIGHTS: weights.step}
            if not whole:
                if asked.receipt is not None:
                    sent[RECEIPT] = asked.receipt
                held.callback(holding.pop_all().close)
                return _Stream(held.pop_all(), self._pieces(reply, asked, engine, weights), reply.status, sent)
        if reply.status == 200:
            if asked.receipt is not None and await self._keep(asked, weights, json.loads(content)):
                sent[RECEIPT] = asked.receipt
            self._count(asked)
        return Response(content, reply.status, sent)

    def _by_canary(self, asked: "_Asked") -> bool:
        """Return whether the canary answers this user."""
        release = self._pool.canary
        return self._canary is not None and release is not None and is_chosen(release, asked.user, self._canary.share)

    async def _pieces(
        self, reply: aiohttp.ClientResponse, asked: "_Asked", engine: ServingEngine, weights: Weights
    ) -> AsyncIterator[bytes]:
        """Yield a stream as it comes. Its status has been sent, so an error becomes an event of the stream."""
        answer, begun = _Answer(), False
        try:
            async with asyncio.timeout(asked.left_s):
                async for line in reply.content:
                    if asked.receipt is not None:
                        if line.startswith(DONE):
                            await self._keep(asked, weights, answer.whole())
                        else:
                            answer.add(line)
                    if not begun:
                        begun = True
                        now = time.monotonic()
                        self.first_piece.observe(now - asked.since)
                        self._pool.begun.append((now, now - asked.since))
                    yield line
            self._count(asked)
        except TimeoutError:
            self.failed += 1
            yield error_event("timeout", f"no whole answer within {self._http.request_timeout_s:g} s")
        except GONE:
            engine.doubt()
            self.failed += 1
            yield error_event("engine_lost", "the engine was lost during this answer; send the request again")

    async def _keep(self, asked: "_Asked", weights: Weights, answer: dict[str, Any]) -> bool:
        """Keep the receipt of an answer. Returns whether it is kept: a full disk does not keep the answer back."""
        if self._receipts is None or asked.receipt is None or not answer.get("choices"):
            return False
        first = answer["choices"][0]
        message = first.get("message") or {"role": "assistant", "content": first.get("text")}
        messages, tools = asked.given.get("messages"), asked.given.get("tools")
        kept = Receipt(asked.receipt, time.time(), weights.release, messages, tools, message)
        try:
            await self._receipts.keep(kept)
        except sqlite3.Error:
            return False
        return True

    def _count(self, asked: "_Asked") -> None:
        self.answered.observe(time.monotonic() - asked.since)


class _Stream(StreamingResponse):
    """A stream that gives back what it holds, also if the client is gone before its first piece."""

    def __init__(
        self, held: AsyncExitStack, pieces: AsyncIterator[bytes], status: int, headers: dict[str, str]
    ) -> None:
        super().__init__(pieces, status, headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


def _user(given: dict[str, Any]) -> str | None:
    """Return the user that a request names, as OpenAI's and Anthropic's APIs do."""
    metadata = given.get("metadata")
    named = given.get("user") or (metadata.get("user_id") if isinstance(metadata, dict) else None)
    return None if named is None else str(named)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the result of `work`, which is cancelled if the client goes away before."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=CLIENT_GONE)
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait([working, gone])


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass(frozen=True)
class _Asked:
    """A request on its way to an engine. Times are those of the monotonic clock."""

    path: str
    body: bytes
    given: dict[str, Any]  # the same, parsed
    name: str  # the engine makes the id of the answer of it
    since: float
    deadline: float
    receipt: str | None  # the id of the answer, if receipts are kept
    user: str  # a canary answers always the same users; a request that names none is a user of its own

    @property
    def left_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


class _Answer:
    """The answer that the pieces of a stream add up to, of its first choice."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, line: bytes) -> None:
        if not line.startswith(b"data: "):
            return
        for choice in json.loads(line[6:]).get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            delta = choice.get("delta") or {}
            self._text.append(delta.get("content") or choice.get("text") or "")
            for call in delta.get("tool_calls") or ():
                known = self._calls.setdefault(call["index"], {"type": "function", "function": {"arguments": ""}})
                function = call.get("function") or {}
                if call.get("id"):
                    known["id"] = call["id"]
                if function.get("name"):
                    known["function"]["name"] = function["name"]
                known["function"]["arguments"] += function.get("arguments") or ""

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._text)}
        if self._calls:
            message["tool_calls"] = [self._calls[i] for i in sorted(self._calls)]
        return {"choices": [{"message": message}]}
