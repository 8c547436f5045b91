"""Errors in the form of OpenAI's API: {"error": {"message", "type", "code", "param"}}, with a fitting status."""

import json
import sqlite3
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sdft.services.base.errors import first_line

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 507: "server_error"}


class ApiError(Exception):
    """A request that gets no answer: status, a code for programs, and a sentence for people."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        problems: list[dict[str, Any]] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.problems, self.retry_after_s = status, code, problems, retry_after_s


def error_body(status: int, code: str, message: str, problems: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error: dict[str, Any] = {"message": message, "type": kind, "code": code, "param": None}
    return {"error": error | ({"problems": problems} if problems else {})}


def error_event(code: str, message: str) -> bytes:
    """Return an error as an event of a stream whose status has been sent."""
    return f"data: {json.dumps(error_body(503, code, message))}\n\n".encode()


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of the application this form."""

    async def api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = error_body(error.status, error.code, str(error), error.problems)
        return JSONResponse(body, error.status, headers)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        messages = {
            404: ("not_found", f"there is no {request.url.path}; the interface is described at /openapi.json"),
            405: ("method_not_allowed", f"{request.url.path} does not take {request.method}"),
        }
        code, message = messages.get(error.status_code, ("http_error", str(error.detail)))
        return JSONResponse(error_body(error.status_code, code, message), error.status_code, error.headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse(error_body(422, "invalid_parameter", f"{place}: {first['msg'].lower()}"), 422)

    async def disk(_: Request, error: Exception) -> JSONResponse:
        what = f"the disk does not take it ({first_line(error)}); make room, and send the request again"
        return JSONResponse(error_body(507, "disk_full", what), 507)

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        what = f"{type(error).__name__} in {request.method} {request.url.path}; the service's output has the rest"
        return JSONResponse(error_body(500, "internal_error", what), 500)

    app.add_exception_handler(OSError, disk)
    app.add_exception_handler(sqlite3.Error, disk)
    app.add_exception_handler(Exception, unexpected)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)
