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
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from sdft.services.config.service import HttpConfig
from sdft.services.serving.engines import EnginesBusy, ServingEngine, ServingPool, Weights
from sdft.services.serving.http.errors import ApiError, error_event
from sdft.services.serving.http.requests import body_of, object_of_body
from sdft.services.serving.receipts import Receipt, Receipts

TRIES = 3  # engines that a request is sent to, if one after the other dies
GONE = (aiohttp.ClientError, ConnectionError, OSError)
DONE = b"data: [DONE]"
PASSED_ON = ("content-type",)
RELEASE, WEIGHTS, RECEIPT = "X-SDFT-Release", "X-SDFT-Weights", "X-SDFT-Receipt"
PREFIXES = {"/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-"}  # of the ids that vLLM makes


class Asking:
    """Passes requests on to the engines."""

    def __init__(self, pool: ServingPool, receipts: Receipts | None, http: HttpConfig) -> None:
        """receipts: None: none are kept."""
        self._pool, self._receipts, self._http = pool, receipts, http
        self.answered = self.failed = 0
        self.seconds = 0.0  # of all answers

    async def answer(self, request: Request) -> Response:
        """Pass a request on, and its answer back."""
        if self._pool.in_flight + self._pool.waiting >= self._http.max_in_flight:
            raise ApiError(
                429,
                "too_many_requests",
                f"{self._http.max_in_flight} requests are in flight (service.http.max_in_flight); send it again later",
                retry_after_s=1,
            )
        body = await body_of(request, self._http.max_body_mib)
        given = object_of_body(body)
        since, name = time.monotonic(), uuid.uuid4().hex
        deadline = since + self._http.request_timeout_s
        for attempt in range(1, TRIES + 1):
            try:
                return await self._try(request.url.path, body, given, name, deadline, since)
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

    async def _try(
        self, path: str, body: bytes, given: dict[str, Any], name: str, deadline: float, since: float
    ) -> Response:
        async with AsyncExitStack() as held:
            left = max(0.0, deadline - time.monotonic())
            engine = await held.enter_async_context(self._pool.engine(left))
            weights = _weights(engine)
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                reply = await held.enter_async_context(
                    engine.http.post(
                        path, data=body, headers={"Content-Type": "application/json", "X-Request-Id": name}
                    )
                )
                headers = {key: value for key, value in reply.headers.items() if key.lower() in PASSED_ON}
                headers |= {RELEASE: str(weights.release), WEIGHTS: weights.step}
                if self._receipts is not None and path in PREFIXES:
                    headers[RECEIPT] = PREFIXES[path] + name
                if "text/event-stream" not in reply.headers.get("Content-Type", ""):
                    content = await reply.read()
                    if reply.status == 200 and path in PREFIXES:
                        await self._keep(given, weights, json.loads(content), headers)
                    self._count(reply.status, since)
                    return Response(content, reply.status, headers)
            rest = held.pop_all()
        pieces = self._pieces(rest, reply, path, given, weights, headers, deadline, since)
        return StreamingResponse(pieces, reply.status, headers)

    async def _pieces(
        self,
        held: AsyncExitStack,
        reply: aiohttp.ClientResponse,
        path: str,
        given: dict[str, Any],
        weights: Weights,
        headers: dict[str, str],
        deadline: float,
        since: float,
    ) -> AsyncIterator[bytes]:
        """Yield a stream as it comes. Its status has been sent, so an error becomes an event of the stream."""
        async with held:
            answer = _Answer()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    async for line in reply.content:
                        if path in PREFIXES:
                            if line.startswith(DONE):
                                await self._keep(given, weights, answer.whole(headers.get(RECEIPT, "")), headers)
                            else:
                                answer.add(line)
                        yield line
                self._count(reply.status, since)
            except TimeoutError:
                self.failed += 1
                yield error_event("timeout", f"no whole answer within {self._http.request_timeout_s:g} s")
            except GONE:
                self.failed += 1
                yield error_event("engine_lost", "the engine was lost during this answer; send the request again")

    async def _keep(
        self, given: dict[str, Any], weights: Weights, answer: dict[str, Any], headers: dict[str, str]
    ) -> None:
        """Keep the receipt of an answer. An answer whose receipt cannot be kept is sent without one."""
        if self._receipts is None or not answer.get("choices"):
            return
        first = answer["choices"][0]
        message = first.get("message") or {"role": "assistant", "content": first.get("text")}
        messages = given.get("messages") if isinstance(given.get("messages"), list) else None
        kept = Receipt(answer["id"], time.time(), weights.release, messages, given.get("tools"), message)
        try:
            await self._receipts.keep(kept)
        except sqlite3.Error:
            headers.pop(RECEIPT, None)

    def _count(self, status: int, since: float) -> None:
        if status == 200:
            self.answered += 1
            self.seconds += time.monotonic() - since


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

    def whole(self, receipt: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._text)}
        if self._calls:
            message["tool_calls"] = [self._calls[i] for i in sorted(self._calls)]
        return {"id": receipt, "choices": [{"message": message}]}


def _weights(engine: ServingEngine) -> Weights:
    if engine.weights is None:  # it has died since it was chosen
        raise aiohttp.ClientConnectionError(f"{engine.name} is not up")
    return engine.weights
