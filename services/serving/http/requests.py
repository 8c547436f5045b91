"""What every route needs of a request: who sends it, and its body within the limit."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request

from sdft.services.data.rows import parse_json
from sdft.services.serving.http.errors import ApiError
from sdft.services.serving.http.guard import refuse_other_sites
from sdft.services.serving.http.rate import Rate
from sdft.services.serving.tokens import ANYONE, Holder, Tokens

MIB = 1 << 20
BODY_S = 60.0  # how long a client may take to send its body


def scope_check(tokens: Tokens | None, scope: str, rate: Rate) -> Callable[[Request], Awaitable[Holder]]:
    """Return a check of a request's token, which counts the request.

    It raises ApiError: 401 without a known token, 403 without the scope, 429 for one request too many.
    """

    async def check(request: Request) -> Holder:  # FastAPI would run a plain function in a thread
        if tokens is None:
            refuse_other_sites(request)
            rate.count(ANYONE.name)
            return ANYONE
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        token = token.strip() if kind.lower() == "bearer" else request.headers.get("X-Api-Key", "")
        if not token:
            raise ApiError(401, "missing_token", "send a token: Authorization: Bearer TOKEN")
        holder = tokens.holder(token)
        if holder is None:
            raise ApiError(401, "unknown_token", "this token is not known here")
        if scope not in holder.scopes:
            raise ApiError(403, "wrong_scope", f"the token of {holder.name} has no scope {scope}")
        rate.count(holder.name)
        return holder

    return check


async def body_of(request: Request, max_mib: float) -> bytes:
    """Return the body. Raises ApiError 413 once it is larger than `max_mib`, 408 if it takes longer than BODY_S."""
    most = int(max_mib * MIB)
    declared = request.headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(max_mib)
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(max_mib)
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, "slow_body", f"the body did not arrive within {BODY_S:g} s") from None
    return b"".join(parts)


def _too_large(max_mib: float) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is larger than {max_mib:g} MiB (service.http.max_body_mib)")


def json_of_body(body: bytes) -> Any:
    """Return the JSON value of a body. Raises ApiError 400."""
    if not body.strip():
        raise ApiError(400, "empty_body", "the body is empty; send JSON")
    try:
        return parse_json(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(400, "not_utf8", f"the body is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ApiError(
            400, "not_json", f"the body is not JSON: {error.msg} at line {error.lineno}, character {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "not_json", f"the body is not JSON: {error}") from None


def object_of_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raises ApiError 400."""
    value = json_of_body(body)
    if not isinstance(value, dict):
        raise ApiError(400, "not_an_object", "the body must be a JSON object")
    return value
