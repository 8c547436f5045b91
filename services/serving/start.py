"""`sdft serve`: from a configuration, or a folder, to a running service, until it is stopped.

my.yaml ─► checks, as for a run ─► folder, lock ─► release 1 ─► engines, gateway, loop
"""

import asyncio
import json
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from sdft.actors.config import EngineSettings
from sdft.actors.shared.process import scratch_folder
from sdft.services.base.digests import digests
from sdft.services.base.errors import RunFailed, UserError
from sdft.services.base.files import existing_file, write_atomically
from sdft.services.config.load import resolved_yaml
from sdft.services.config.run import RunConfig
from sdft.services.config.service import HttpConfig
from sdft.services.inbox.inbox import Inbox, InboxInUse
from sdft.services.inbox.lines import InboxDamaged
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import Prepared
from sdft.services.releases.events import Candidate, Served
from sdft.services.releases.journal import Journal, JournalDamaged, ServiceRunning
from sdft.services.serving.engines import ServingEngine, ServingPool, Weights
from sdft.services.serving.folder import SERVICE, ServiceFolder
from sdft.services.serving.http.app import make_app
from sdft.services.serving.loop import Loop
from sdft.services.serving.receipts import Receipts
from sdft.services.serving.service import Service
from sdft.services.serving.taking import RecordChecks
from sdft.services.serving.tokens import Tokens
from sdft.services.serving.window import window_run

STOP_S = 5  # for answers in flight when the service is stopped
SAMPLE_ROW = {
    "id": "sample",
    "prompt": "Name the days of the week.",
    "demonstration": "Monday.",
    "context": "A week.",
    "feedback": "Name all of them.",
}


@dataclass(frozen=True)
class Checked:
    """A service that can start."""

    config: RunConfig  # with absolute paths
    prepared: Prepared  # as a run on one sample row
    folder: ServiceFolder


def check_service(config: RunConfig, folder: ServiceFolder) -> Checked:
    """Check a service's configuration, model, evaluation sets and plan, as for a run. Raises UserError.

    config: with absolute paths. Makes the folder.
    """
    assert config.service is not None
    if config.data is not None and (config.data.format != "messages" or config.data.columns):
        raise UserError(
            "data.format and data.columns are of a file; a service takes rows in our own columns; remove them"
        )
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.engines.mkdir(exist_ok=True)
        sample = folder.path / "sample.jsonl"
        sample.write_text(json.dumps(SAMPLE_ROW) + "\n")
    except OSError as error:
        raise UserError(f"{folder.path} cannot be written ({error.strerror}); name another folder") from None
    for key in ("tls_certificate", "tls_key"):
        if (value := getattr(config.service.http, key)) is not None:
            existing_file(f"service.http.{key}", value, folder.path)
    run = window_run(config, config.model, str(sample))
    prepared = prepare(run, folder.path / "config.yaml")
    shape = json.loads((prepared.model / "config.json").read_text())
    limit, wanted = shape.get("max_position_embeddings"), config.service.serving.max_model_len
    if limit is not None and wanted > limit:
        raise UserError(
            f"service.serving.max_model_len is {wanted}, but the model in {prepared.model} has {limit} positions; "
            f"lower it"
        )
    return Checked(config, prepared, folder)


async def serve(checked: Checked, say: Callable[[str], None]) -> None:
    """Run the service until cancelled. Raises UserError if another one runs in its folder."""
    folder, config = checked.folder, checked.config
    settings = config.service
    assert settings is not None
    async with AsyncExitStack() as stack:
        journal, inbox = _opened(folder)
        stack.callback(journal.close)
        stack.push_async_callback(inbox.close)
        _first_release(journal, checked.prepared.model)
        write_atomically(folder.config, resolved_yaml(config).encode())
        receipts = Receipts(folder.receipts, settings.receipts.days) if settings.receipts.keep else None
        if receipts is not None:
            stack.push_async_callback(receipts.close)
        tokens = None if settings.http.tokens is None else Tokens(Path(settings.http.tokens))
        sockets = stack.enter_context(scratch_folder("sdft-gateway-"))
        service: Service

        def notice(text: str) -> None:
            service.notices.append((time.time(), text))
            say(text)

        weights = _weights(folder, journal)
        pool = ServingPool(lambda pool: _engines(checked, sockets, pool, notice), weights)
        loop = Loop(folder, config, journal, inbox, pool, notice)
        checks = RecordChecks(checked.prepared)
        service = Service(folder, settings, journal, inbox, receipts, checks, tokens, pool, loop)
        server = _Server(_uvicorn(make_app(service), settings.http))
        stack.callback(lambda: (folder.path / SERVICE).unlink(missing_ok=True))
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve(), name="gateway")
            tasks.create_task(_announce(server, serving, folder, settings.http, notice))
            for engine in pool.engines:
                tasks.create_task(engine.run(), name=engine.name)
            tasks.create_task(loop.run(), name="loop")
            try:
                await asyncio.shield(serving)
            except asyncio.CancelledError:
                server.should_exit = True  # answers in flight may end
                await asyncio.wait([serving], timeout=STOP_S + 1)
                raise
            raise RunFailed(f"the gateway has ended; can it listen on {settings.http.host}:{settings.http.port}?")


def _opened(folder: ServiceFolder) -> tuple[Journal, Inbox]:
    try:
        journal = Journal(folder.journal)
    except (ServiceRunning, JournalDamaged) as error:
        raise UserError(str(error)) from None
    try:
        return journal, Inbox(folder.inbox)
    except (InboxInUse, InboxDamaged) as error:
        journal.close()
        raise UserError(str(error)) from None


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
        journal.write(Served(1, "start", [], time.time()))


def _weights(folder: ServiceFolder, journal: Journal) -> Weights:
    assert journal.state.served is not None
    release = journal.state.releases[journal.state.served]
    version = "as started" if release.window is None else f"window {release.window}, step {release.step}"
    return Weights(release.number, folder.path / release.folder, release.files, version)


def _engines(checked: Checked, sockets: Path, pool: ServingPool, notice: Callable[[str], None]) -> list[ServingEngine]:
    settings = checked.config.service
    assert settings is not None
    return [
        ServingEngine(
            name=f"engine {i}",
            sockets=sockets,
            logs=checked.folder.engines,
            settings=lambda weights: _engine_settings(checked, weights.folder),
            served=lambda: pool.served,
            model_name=settings.name,
            tool_parser=settings.serving.tool_parser,
            start_timeout_s=settings.serving.start_timeout_s,
            changed=pool.notify,
            notice=notice,
        )
        for i in range(settings.serving.replicas)
    ]


def _engine_settings(checked: Checked, model: Path) -> EngineSettings:
    config, prepared = checked.config, checked.prepared
    assert config.service is not None
    serving = config.service.serving
    cuda = config.device == "cuda"
    gap = config.weights.max_probe_gap or (0.001 if config.dtype == "float32" else 0.08)
    return EngineSettings(
        model=str(model),
        dtype=config.dtype,
        device=config.device,
        max_model_len=serving.max_model_len,
        max_logprobs=20,  # what OpenAI's API allows
        max_num_seqs=serving.max_num_seqs,
        hold_batches=False,
        share_prompts=False,
        gpu_memory_utilization=serving.gpu_memory_utilization,
        enforce_eager=serving.enforce_eager,
        max_probe_gap=gap,
        threads=serving.threads,
        kv_cache_gib=serving.kv_cache_gib or (None if cuda else 1),
        serves=True,
        vocabulary=prepared.vocabulary,
    )


def _uvicorn(app: Any, http: HttpConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=http.host,
        port=http.port,
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


async def _announce(
    server: uvicorn.Server, serving: "asyncio.Task[None]", folder: ServiceFolder, http: HttpConfig, notice: Any
) -> None:
    """Write down where the service answers, once it does."""
    while not server.started and not serving.done():
        await asyncio.sleep(0.05)
    if not server.started:
        return
    port = server.servers[0].sockets[0].getsockname()[1]
    host = f"[{http.host}]" if ":" in http.host else http.host
    url = f"{'https' if http.tls_key else 'http'}://{host}:{port}"
    with suppress(OSError):
        write_atomically(folder.path / SERVICE, json.dumps({"url": url, "pid": os.getpid()}).encode())
    notice(f"the service answers at {url} (page) and {url}/v1")
