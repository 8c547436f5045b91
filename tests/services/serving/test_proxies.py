"""Ray Serve's proxies in front of a gateway: real Ray, real Serve, a gateway of a few lines."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray
from aiohttp import ClientSession, web

from sdft.services.base.errors import UserError
from sdft.services.config.service import ProxiesConfig
from sdft.services.serving.proxies import proxies

ended: list[str] = []  # requests that the client has left


async def answer(request: web.Request) -> web.StreamResponse:
    """Answer with what has come: whole, in pieces, or for ever."""
    body = await request.read()
    if request.path == "/v1/pieces":
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-SDFT-Release": "3"})
        await reply.prepare(request)
        try:
            for i in range(3 if request.query["n"] == "3" else 10_000):
                await reply.write(f"data: {i}\n\n".encode())
                await asyncio.sleep(0.2)
        except (ConnectionError, asyncio.CancelledError):
            ended.append(request.path)
            raise
        return reply
    said = {
        "method": request.method,
        "path": request.path_qs,
        "bytes": len(body),
        "token": request.headers.get("Authorization"),
    }
    return web.json_response(said, status=418, headers={"X-SDFT-Release": "3", "Retry-After": "7"})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listens:
        return int(listens.getsockname()[1])


def proxied(work: Callable[[ClientSession, web.AppRunner], Awaitable[None]]) -> list[str]:
    """Run `work` with a client of the proxies and the gateway. Returns the notices."""
    notices: list[str] = []

    async def run() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", answer)
        gateway = web.AppRunner(app, handler_cancellation=True)
        await gateway.setup()
        port, own = free_port(), free_port()
        await web.TCPSite(gateway, "127.0.0.1", own).start()
        config = ProxiesConfig(host="127.0.0.1", port=port, replicas=1)
        try:
            async with (
                proxies(config, f"http://127.0.0.1:{own}", notices.append),
                ClientSession(f"http://127.0.0.1:{port}") as client,
            ):
                await work(client, gateway)
        finally:
            await gateway.cleanup()

    asyncio.run(run())
    return notices


def of_serve() -> list[str]:
    """Return the actors of Ray Serve that are left."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["namespace"] == "serve"]


def test_requests_and_answers_pass_as_they_are_and_piece_by_piece(ray_cluster: None) -> None:
    ended.clear()

    async def work(client: ClientSession, gateway: web.AppRunner) -> None:
        headers = {"Authorization": "Bearer one"}
        async with client.post("/v1/records?state=x%20y", data=b"x" * (20 << 20), headers=headers) as reply:
            said: dict[str, Any] = await reply.json()
            assert (reply.status, reply.headers["X-SDFT-Release"], reply.headers["Retry-After"]) == (418, "3", "7")
        path = "/v1/records?state=x%20y"
        assert said == {"method": "POST", "path": path, "bytes": 20 << 20, "token": "Bearer one"}
        async with client.get("/healthz") as reply:
            assert (await reply.json()) == {"method": "GET", "path": "/healthz", "bytes": 0, "token": None}
        loop, came = asyncio.get_running_loop(), []
        async with client.post("/v1/pieces?n=3", json={}) as reply:
            async for piece in reply.content.iter_any():
                came.append((piece, loop.time()))
        assert b"".join(piece for piece, _ in came) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
        assert came[-1][1] - came[0][1] > 0.3, "the pieces came together"
        async with client.post("/v1/pieces?n=all", json={}) as reply:
            await reply.content.readany()
        async with asyncio.timeout(30):  # the client is gone: so is the request of the gateway
            while not ended:
                await asyncio.sleep(0.05)
        await gateway.cleanup()
        async with client.post("/v1/chat/completions", json={}) as reply:
            error = (await reply.json())["error"]
            assert (reply.status, error["code"], reply.headers["Retry-After"]) == (503, "no_gateway", "5")

    (notice,) = proxied(work)
    assert notice.startswith("Ray Serve's proxies answer on port ")
    assert not of_serve()


def test_a_port_that_is_taken_is_a_sentence(ray_cluster: None) -> None:
    async def run(port: int) -> None:
        async with proxies(ProxiesConfig(host="127.0.0.1", port=port, replicas=1), "http://127.0.0.1:9", print):
            raise AssertionError("it has started")

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError) as error:
        asyncio.run(run(taken.getsockname()[1]))
    assert str(error.value).startswith("service.http.proxies: Ray Serve could not be started (")
    assert not of_serve()
