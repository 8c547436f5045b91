"""HTTP through Ray Serve: a proxy on each node of the cluster, and replicas that pass requests on to the gateway.

    client ─► proxy of a node ─► replica ─► gateway: checks, engines, the inbox with its one writer
           ◄─────── pieces of the answer, as they come ◄───────

A replica holds nothing, so their number and their death change nothing but where requests pass. Tokens are checked by
the gateway.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from sdft.actors.shared.reason import reason
from sdft.services.base.errors import UserError
from sdft.services.config.service import ProxiesConfig
from sdft.services.serving.http.errors import error_body

NAME = "sdft"  # of the application in Ray Serve
# Of one connection, not of the message (RFC 9110, section 7.6.1); and what the next connection sets itself.
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "host")
)


class PassOn:
    """A replica: passes each request on, and the answer back."""

    def __init__(self, gateway: str) -> None:
        """gateway: its URL, without a path."""
        self._gateway = gateway
        self._http: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> Response:
        if self._http is None:  # the constructor has no event loop
            no_limit = aiohttp.ClientTimeout(total=None)  # the gateway has the limits
            self._http = aiohttp.ClientSession(
                self._gateway, connector=aiohttp.TCPConnector(limit=0), timeout=no_limit, auto_decompress=False
            )
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(k, v) for k, v in request.headers.items() if k not in HOP_BY_HOP]
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        try:
            reply = await self._http.request(
                request.method,
                path,
                headers=headers,
                data=request.stream() if has_body else None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            return _unreachable(error)
        kept = {k: v for k, v in reply.headers.items() if k.lower() not in HOP_BY_HOP}
        return StreamingResponse(_pieces(reply), reply.status, kept)


async def _pieces(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the answer. If the client goes away, the connection to the gateway is closed, which ends the request."""
    try:
        async for piece in reply.content.iter_any():
            yield piece
    finally:
        reply.close()


def _unreachable(error: Exception) -> Response:
    said = f"the gateway cannot be reached ({type(error).__name__}); send it again later"
    return JSONResponse(error_body(503, "no_gateway", said), 503, {"Retry-After": "5"})


@asynccontextmanager
async def proxies(config: ProxiesConfig, gateway: str, notice: Callable[[str], None]) -> AsyncIterator[None]:
    """Have the proxies answer while the context lasts. The process must be connected to a cluster.

    Raises UserError if Ray Serve cannot be started.
    """
    try:
        try:
            await asyncio.to_thread(_start, config, gateway)
        except Exception as error:  # Ray Serve raises errors of many kinds, RuntimeError among them
            raise UserError(f"service.http.proxies: Ray Serve could not be started ({reason(error)})") from error
        notice(f"Ray Serve's proxies answer on port {config.port} of the cluster's nodes")
        yield
    finally:
        await asyncio.to_thread(_stop)


def _start(config: ProxiesConfig, gateway: str) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host=config.host, port=config.port))
    options: dict[str, Any] = {
        "num_replicas": config.replicas,
        "ray_actor_options": {"num_cpus": config.cpus},
        "max_ongoing_requests": config.max_ongoing,
        # The gateway has ended its answers before the replicas are stopped, and `ray job stop` kills after 3 s.
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": 1,
    }
    serve.run(serve.deployment(PassOn).options(**options).bind(gateway), name=NAME, route_prefix="/")


def _stop() -> None:
    from ray import serve

    applications = serve.status().applications.keys()
    if not applications - {NAME}:
        serve.shutdown()
    elif NAME in applications:  # another application of the cluster needs the rest
        serve.delete(NAME)
