"""Where the process of an engine answers: on a Unix socket, or on a port with a key, for a gateway elsewhere."""

import hmac
import socket
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True)
class UnixSocket:
    """A socket in a folder that only this user can enter."""

    path: str


@dataclass(frozen=True)
class Port:
    """A socket that listens already, from the parent process."""

    fd: int
    key: str  # requests have it as their bearer token


Listening = UnixSocket | Port


def listening_of(given: dict[str, Any]) -> Listening:
    """Return what a parent process has written down."""
    return UnixSocket(**given) if "path" in given else Port(**given)


async def answer(app: ASGIApp, listening: Listening) -> None:
    """Answer requests until a signal comes."""
    match listening:
        case UnixSocket(path):
            await uvicorn.Server(_config(app, uds=path)).serve()
        case Port(fd, key):
            with socket.socket(fileno=fd) as listens:
                await uvicorn.Server(_config(_locked(app, key))).serve(sockets=[listens])


def _config(app: ASGIApp, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(app, log_level="warning", access_log=False, **more)


def _locked(app: ASGIApp, key: str) -> ASGIApp:
    """Return the application, for requests with the key alone."""
    wanted = f"Bearer {key}".encode()

    async def locked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and not hmac.compare_digest(_token(scope), wanted):
            if scope["type"] == "http":
                await PlainTextResponse("this engine answers its gateway only", 401)(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        await app(scope, receive, send)

    return locked


def _token(scope: Scope) -> bytes:
    return next((bytes(value) for name, value in scope["headers"] if name == b"authorization"), b"")
