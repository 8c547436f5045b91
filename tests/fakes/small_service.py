"""A service in this process, with engines and training of a few lines, behind real HTTP."""

import asyncio
import json
import shutil
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml

from sdft.services.config.load import load_config
from sdft.services.planning.prepare import prepare
from sdft.services.serving.check import Checked
from sdft.services.serving.folder import SERVICE, ServiceFolder
from sdft.services.serving.programs import Programs
from sdft.services.serving.start import serve
from sdft.services.serving.window import window_run

FAKES = Path(__file__).parent
PROGRAMS = Programs(
    engine=(sys.executable, str(FAKES / "service_engine.py")), sdft=(sys.executable, str(FAKES / "service_sdft.py"))
)
WAIT_S = 60


def checked_service(folder: Path, model: Path, method: str = "sft", **service: Any) -> Checked:
    """Return a service that can start, with its folder in `folder`. service: keys of its section."""
    path = folder / "service.yaml"
    settings = {"http": {"port": 0}, "window": {"min_records": 4, "held_out": 0.0, "replay": 0.0}}
    for key, value in service.items():
        settings[key] = settings.get(key, {}) | value
    config = {"model": str(model), "training": {"batch_size": 2}, "method": method, "service": settings}
    path.write_text(
        yaml.safe_dump(
            config | {"data": {"template": "turn", "max_prompt_tokens": 60, "max_teacher_prompt_tokens": 250}}
        )
    )
    made = load_config(path)
    sample = folder / "sample.jsonl"
    sample.write_text('{"prompt": "Hi", "demonstration": "Ho", "feedback": "x", "context": "y"}\n')
    run = folder / "run"
    (run / "engines").mkdir(parents=True, exist_ok=True)
    prepared = prepare(window_run(made, str(model), str(sample)), path)
    return Checked(made, prepared, ServiceFolder(run))


class Client(httpx.AsyncClient):
    """What a test asks of the service."""

    async def got(self, path: str) -> Any:
        return (await self.get(f"/v1/{path}")).raise_for_status().json()

    async def teach(self, *demonstrations: str, key: str | None = None) -> list[str]:
        """Post a demonstration for each text; return the ids."""
        rows = [{"prompt": f"Question {i}?", "demonstration": text} for i, text in enumerate(demonstrations)]
        headers = {"Idempotency-Key": key} if key else {}
        answer = await self.post("/v1/demonstrations", json=rows, headers=headers)
        return list(answer.raise_for_status().json()["ids"])

    async def ask(self, text: str, **more: Any) -> str:
        body = {"messages": [{"role": "user", "content": text}]} | more
        answer = (await self.post("/v1/chat/completions", json=body)).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"])

    async def until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + WAIT_S
        while not await holds():
            assert time.monotonic() < deadline, await self.got("status")
            await asyncio.sleep(0.05)

    async def release(self, number: int) -> dict[str, Any]:
        """Return a release once it is decided."""

        async def decided() -> bool:
            answer = await self.get(f"/v1/releases/{number}")
            return answer.status_code == 200 and answer.json()["status"] != "candidate"

        await self.until(decided)
        return dict(await self.got(f"releases/{number}"))

    async def settled(self) -> None:
        """Wait until the loop waits for records or for a person."""

        async def waits() -> bool:
            return str((await self.got("status"))["doing"]).startswith(("waits for records", "waits for a person"))

        await self.until(waits)


@asynccontextmanager
async def running(checked: Checked, verify: ssl.SSLContext | bool = True) -> AsyncIterator[Client]:
    """Run the service, and yield a client once an engine is up."""
    place = checked.folder.path / SERVICE
    place.unlink(missing_ok=True)
    service = asyncio.create_task(serve(checked, lambda text: None, PROGRAMS))
    try:
        deadline = time.monotonic() + WAIT_S
        while not place.exists():
            if service.done():
                service.result()
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        async with Client(base_url=json.loads(place.read_text())["url"], timeout=60, verify=verify) as client:

            async def ready() -> bool:
                return (await client.get("/readyz")).status_code == 200

            await client.until(ready)
            yield client
    finally:
        service.cancel()
        with suppress(asyncio.CancelledError):
            await service


def copied(checked: Checked, to: Path) -> Checked:
    """Return the same service with a copy of its folder."""
    shutil.copytree(checked.folder.path, to)
    return Checked(checked.config, checked.prepared, ServiceFolder(to))
