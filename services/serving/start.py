"""`sdft serve`: from a configuration, or a folder, to a running service, until it is stopped.

my.yaml ─► checks, as for a run ─► folder, lock ─► release 1 ─► engines, gateway, loop
"""

import asyncio
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import uvicorn

from sdft.actors.config import TURNS
from sdft.actors.shared.process import scratch_folder
from sdft.services.base.digests import digests
from sdft.services.base.errors import RunFailed, UserError
from sdft.services.base.files import write_atomically
from sdft.services.config.load import resolved_yaml
from sdft.services.config.service import HttpConfig, ServiceConfig
from sdft.services.inbox.inbox import Inbox
from sdft.services.releases.events import Candidate, Served
from sdft.services.releases.journal import Journal
from sdft.services.serving.changing import Changing
from sdft.services.serving.check import Checked, engine_settings, warnings
from sdft.services.serving.decisions import Decisions, weights_of
from sdft.services.serving.engine import ServingEngine
from sdft.services.serving.feedback import trained_kinds
from sdft.services.serving.folder import SERVICE, ServiceFolder
from sdft.services.serving.host import Host, LocalHost
from sdft.services.serving.http.app import make_app
from sdft.services.serving.loop import Loop
from sdft.services.serving.pool import ServingPool
from sdft.services.serving.programs import Programs
from sdft.services.serving.receipts import Receipts
from sdft.services.serving.record_index import RecordIndex
from sdft.services.serving.scaling import Policy, Scaling
from sdft.services.serving.service import Notices, Service
from sdft.services.serving.taking import RecordChecks
from sdft.services.serving.tokens import Tokens

STARTED = Programs()
STOP_S = 5  # for answers in flight when the service is stopped


async def serve(checked: Checked, say: Callable[[str], None], programs: Programs = STARTED) -> None:
    """Run the service until cancelled. Raises UserError if another one runs in its folder, or the port is taken."""
    folder, settings = checked.folder, checked.settings
    async with AsyncExitStack() as stack:
        journal = Journal(folder.journal)
        stack.callback(journal.close)
        inbox = Inbox(folder.inbox)
        stack.push_async_callback(inbox.close)
        write_atomically(folder.config, resolved_yaml(checked.config).encode())
        _first_release(journal, checked.prepared.model)
        receipts = _receipts(folder, settings)
        if receipts is not None:
            stack.push_async_callback(receipts.close)
        tokens = None if settings.http.tokens is None else Tokens(Path(settings.http.tokens))
        listening = stack.enter_context(_listening(settings.http))
        host = stack.enter_context(_host(checked, programs))
        notices = Notices(say)
        for warning in warnings(checked):
            notices(warning)
        assert journal.state.served is not None
        pool = ServingPool(
            lambda pool: [_engine(checked, host, pool, notices, i) for i in range(settings.serving.replicas)],
            weights_of(folder, journal.state, journal.state.served),
        )
        changing = Changing(pool, settings.serving.start_timeout_s + settings.http.request_timeout_s)
        decisions = Decisions(folder, settings, journal, inbox, pool, changing, notices)
        records = RecordIndex(journal, inbox)
        turns = {TURNS: str(host.socket(_name(0)))} if isinstance(host, LocalHost) and settings.serving.turns else {}
        loop = Loop(folder, checked.config, journal, inbox, records, receipts, decisions, programs.sdft, turns, notices)
        service = Service(
            folder=folder,
            config=settings,
            journal=journal,
            inbox=inbox,
            receipts=receipts,
            checks=RecordChecks(checked.prepared),
            trained_feedback=trained_kinds(checked.config),
            tokens=tokens,
            pool=pool,
            records=records,
            decisions=decisions,
            loop=loop,
            notice=notices,
        )
        scaling = Scaling(
            pool, Policy.of(settings.serving), lambda i: _engine(checked, host, pool, notices, i), notices
        )
        server = _Server(_uvicorn(make_app(service), settings.http))
        try:
            await _run(service, scaling, server, listening)
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None


async def _run(service: Service, scaling: Scaling, server: "_Server", listening: socket.socket) -> None:
    """Run the parts of a service until cancelled, or until one of them fails."""
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[listening]), name="gateway")
        announced = tasks.create_task(_announced(server, service, listening), name="announce")
        tasks.create_task(scaling.run(), name="engines")
        tasks.create_task(service.loop.run(), name="loop")
        if service.http.proxies is not None:
            tasks.create_task(_proxied(server, service, listening), name="proxies")
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            announced.cancel()
            server.should_exit = True  # answers in flight may end
            await asyncio.wait([serving], timeout=STOP_S + 1)
            raise
        raise RunFailed("the gateway has ended")


def _listening(http: HttpConfig) -> socket.socket:
    """Return a socket that listens. Raises UserError if it cannot."""
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    try:
        listening = socket.create_server((http.host, http.port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"service.http: the service cannot listen on {http.host}, port {http.port} ({error.strerror}); choose "
            f"another one, or stop what listens there"
        ) from None
    # Connections inherit it. asyncio sets it only on sockets that name their protocol, and without it the kernel holds
    # back each small piece of a stream until the client has acknowledged the one before: 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _first_release(journal: Journal, model: Path) -> None:
    """Make the model that the service begins with its release 1; UserError if it began with another one."""
    state = journal.state
    if not state.releases:
        journal.write(Candidate(1, None, str(model), digests(model), 0, {}, time.time()))
    elif Path(state.releases[1].folder) != model:
        raise UserError(
            f"{journal.path.parent}: this service began with the model in {state.releases[1].folder}, and the "
            f"configuration names {model}; set model back, or name another --run-dir"
        )
    if state.served is None:
        journal.write(Served(1, "start", time.time()))


def _receipts(folder: ServiceFolder, settings: ServiceConfig) -> Receipts | None:
    try:
        return Receipts(folder.receipts, settings.receipts.days) if settings.receipts.keep else None
    except sqlite3.Error as error:
        raise UserError(f"{folder.receipts} cannot be used ({error}); remove it to begin without receipts") from None


@contextmanager
def _host(checked: Checked, programs: Programs) -> Iterator[Host]:
    """Yield where the engines run."""
    config, place = checked.config, checked.settings.serving.cluster
    if place is None:
        with scratch_folder("sdft-gateway-") as sockets:
            yield LocalHost(programs.engine, sockets)
        return
    from sdft.services.cluster.cluster import cluster  # imports ray
    from sdft.services.serving.cluster_host import ClusterHost

    gpus = place.gpus if config.device == "cuda" else 0
    with cluster(config.ray, checked.prepared.plan, None):
        yield ClusterHost(programs.engine, place, gpus, checked.settings.serving.start_timeout_s)


def _engine(
    checked: Checked, host: Host, pool: ServingPool, notice: Callable[[str], None], number: int
) -> ServingEngine:
    settings = checked.settings
    return ServingEngine(
        name=_name(number),
        host=host,
        logs=checked.folder.engines,
        settings=lambda weights: engine_settings(checked, weights.folder),
        wanted=pool.wanted,
        model_name=settings.name,
        tool_parser=settings.serving.tool_parser,
        start_timeout_s=settings.serving.start_timeout_s,
        changed=pool.notify,
        notice=notice,
    )


def _name(number: int) -> str:
    return f"engine {number}"


def _uvicorn(app: Any, http: HttpConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ssl_certfile=http.tls_certificate,
        ssl_keyfile=http.tls_key,
        timeout_graceful_shutdown=STOP_S,
        server_header=False,
    )


class _Server(uvicorn.Server):
    """A server without signal handlers of its own: the command has them."""

    @contextmanager
    def capture_signals(self) -> Any:
        with nullcontext():
            yield


async def _started(server: uvicorn.Server) -> None:
    while not server.started:
        await asyncio.sleep(0.02)


async def _proxied(server: uvicorn.Server, service: Service, listening: socket.socket) -> None:
    """Have Ray Serve's proxies pass requests on to the gateway, until cancelled."""
    from ray.util import get_node_ip_address

    from sdft.services.serving.proxies import proxies

    assert service.http.proxies is not None
    await _started(server)
    host, port = listening.getsockname()[:2]
    reached = get_node_ip_address() if host in ("0.0.0.0", "::") else host
    url = f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"
    async with proxies(service.http.proxies, url, service.notice):
        await asyncio.Event().wait()


async def _announced(server: uvicorn.Server, service: Service, listening: socket.socket) -> None:
    """Keep the file that says where the service answers, from when it does until cancelled."""
    path = service.folder.path / SERVICE
    try:
        await _started(server)
        _announce(service, path, listening)
        await asyncio.Event().wait()
    finally:
        path.unlink(missing_ok=True)


def _announce(service: Service, path: Path, listening: socket.socket) -> None:
    http, port = service.http, listening.getsockname()[1]
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)  # an address of this machine
    host = f"[{own}]" if ":" in own else own
    url = f"{'https' if http.tls_key else 'http'}://{host}:{port}"
    with suppress(OSError):
        write_atomically(path, json.dumps({"url": url, "pid": os.getpid()}).encode())
    service.notice(f"the service answers at {url} (page) and {url}/v1")
