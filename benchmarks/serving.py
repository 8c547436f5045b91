"""A service beside plain `vllm serve`, on the built-in model: throughput, first token, gaps between tokens.

    python -m benchmarks.serving

The same load on both: AT_ONCE streams of TOKENS tokens each, through the openai client. They run in turn, ROUNDS times,
alone on the machine. The service is then measured while a window trains, and while releases change every few seconds.
Ratios are to plain vLLM in the same round. Last, records per second that the inbox takes durably, over HTTP.
"""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import openai

from benchmarks.measure import report
from sdft.services.config.dtype import native_dtype
from sdft.services.planning.models import resolve_model

AT_ONCE, REQUESTS, TOKENS = 8, 32, 64
ROUNDS = 2
SEQUENCES, LENGTH = 16, 1024
POSTERS, POSTED = 32, 2000
EXAMPLE = Path(__file__).parent.parent / "examples" / "service" / "service.yaml"
START_S = 300


@dataclass
class Load:
    """What the clients saw."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    failed: int = 0

    def row(self, what: str) -> dict[str, Any]:
        gaps = sorted(self.gaps)
        return {
            "what": what,
            "tokens/s": self.tokens / self.seconds,
            "first token ms": 1000 * statistics.median(self.first),
            "p99 between tokens ms": 1000 * gaps[int(0.99 * len(gaps))],
            "longest ms": 1000 * gaps[-1],
            "failed": self.failed,
        }


async def load(url: str, requests: int = REQUESTS) -> Load:
    """Send the load and return what came."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    found, turn = Load(), asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with turn:
            last = since = time.monotonic()
            try:
                stream = await client.chat.completions.create(
                    model="sdft",
                    messages=[{"role": "user", "content": f"Tell me what you know of the number {number}."}],
                    max_tokens=TOKENS,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                async for chunk in stream:
                    if not chunk.choices or not chunk.choices[0].delta.content:
                        continue
                    now = time.monotonic()
                    (found.first if last == since else found.gaps).append(now - last)
                    last = now
                found.tokens += TOKENS
            except openai.OpenAIError:
                found.failed += 1

    since = time.monotonic()
    await asyncio.gather(*(one(i) for i in range(requests)))
    found.seconds = time.monotonic() - since
    await client.close()
    return found


@asynccontextmanager
async def process(command: list[str], log: Path, ready: Any) -> AsyncIterator[str]:
    """Run a server, and yield its address once `ready()` returns it."""
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "-".join(("0", str((os.cpu_count() or 1) - 1)))}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    with log.open("w") as file:
        running = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        async with asyncio.timeout(START_S):
            while (url := await ready()) is None:
                if running.poll() is not None:
                    raise RuntimeError(f"{command[:4]} has ended: {log.read_text()[-2000:]}")
                await asyncio.sleep(0.2)
        await load(url, AT_ONCE)  # the first requests compile and allocate
        yield url
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(90)


async def answers(url: str, path: str) -> str | None:
    with suppress(httpx.HTTPError):
        async with httpx.AsyncClient() as http:
            if (await http.get(url + path)).status_code == 200:
                return url
    return None


def plain(folder: Path, model: Path) -> Any:
    """`vllm serve` with the same model, lengths and dtype."""
    # What `vllm serve` runs: the command itself wants a package named vllm, and on a CPU it is vllm-cpu.
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "sdft"]
    words += ["--port", "8765"]
    words += ["--dtype", native_dtype("cpu"), "--enforce-eager", "--max-model-len", str(LENGTH)]
    words += ["--max-num-seqs", str(SEQUENCES), "--disable-log-stats", "--disable-uvicorn-access-log"]
    url = "http://127.0.0.1:8765"
    return process([sys.executable, *words], folder / "plain.log", lambda: answers(url, "/health"))


def service(folder: Path, name: str, **more: Any) -> Any:
    """`sdft serve` on the example's configuration."""
    run = folder / name
    settings = {
        "service.http.port": 0,
        "service.serving.max_model_len": LENGTH,
        "service.serving.max_num_seqs": SEQUENCES,
    }
    settings |= {key.replace("__", "."): value for key, value in more.items()}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    words = ["-m", "sdft.services.cli", "serve", str(EXAMPLE), "--run-dir", str(run), *sets]

    async def ready() -> str | None:
        place = run / "service.json"
        return await answers(json.loads(place.read_text())["url"], "/readyz") if place.exists() else None

    return process([sys.executable, *words], folder / f"{name}.log", ready)


async def training(url: str) -> Load:
    """The load while a window trains."""
    rows = [json.loads(line) for line in (EXAMPLE.parent.parent / "tools" / "train.jsonl").read_text().splitlines()]
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        (await http.post("/v1/demonstrations", json=rows)).raise_for_status()
        async with asyncio.timeout(900):
            while not ((await http.get("/v1/status")).json()["window"] or {}).get("step"):
                await asyncio.sleep(1)
        return await load(url)


async def changing(url: str) -> Load:
    """The load while the two newest releases are served in turn."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        async with asyncio.timeout(1800):
            while (
                len((await http.get("/v1/releases")).json()["releases"]) < 2
                or ((await http.get("/v1/status")).json()["window"])
            ):
                await asyncio.sleep(1)
        await asyncio.sleep(5)

        async def change() -> None:
            while True:
                served = (await http.get("/v1/releases")).json()["served"]
                (await http.post(f"/v1/releases/{3 - served}/promote")).raise_for_status()
                await asyncio.sleep(2)

        task = asyncio.create_task(change())
        found = await load(url)
        task.cancel()
        return found


async def posting(url: str) -> list[dict[str, Any]]:
    """Records per second, each acknowledged once it is on the disk: one a request, and a hundred a request."""
    rows = []
    async with aiohttp.ClientSession(url) as http:  # httpx would take more time than the service
        for size in (1, 100):
            turn = asyncio.Semaphore(POSTERS)

            async def one(number: int, size: int = size, turn: asyncio.Semaphore = turn) -> None:
                body = [{"prompt": f"What is {number} and {i}?", "demonstration": "It is a sum."} for i in range(size)]
                async with turn, http.post("/v1/demonstrations", json=body) as answer:
                    answer.raise_for_status()
                    await answer.read()

            since = time.monotonic()
            await asyncio.gather(*(one(i) for i in range(POSTED // size)))
            rows.append({"records a request": size, "records/s": POSTED / (time.monotonic() - since)})
    return rows


async def measure(folder: Path) -> None:
    model = resolve_model("smollm2-135m", folder)
    rows: list[dict[str, Any]] = []
    for i in range(ROUNDS):
        async with plain(folder, model) as url:
            base = await load(url)
        async with service(folder, f"service-{i}") as url:
            ours = await load(url)
        ratio = (ours.tokens / ours.seconds) / (base.tokens / base.seconds)
        rows += [base.row("vllm serve") | {"of vllm": 1.0}, ours.row("sdft serve, no training") | {"of vllm": ratio}]
    async with service(folder, "posting", service__window__min_records=10**6) as url:
        posted = await posting(url)
    title = f"SmolLM2-135M in {native_dtype('cpu')}, {AT_ONCE} streams of {TOKENS} tokens"
    report("serving", f"Serving, {title}", rows)
    report("inbox", f"Records that the inbox takes durably over HTTP, {POSTERS} clients", posted)
    rows = []
    async with service(folder, "training") as url:
        for what, found in (("a window trains", await training(url)), ("releases change", await changing(url))):
            ratio = (found.tokens / found.seconds) / (base.tokens / base.seconds)
            rows.append(found.row(f"sdft serve, {what}") | {"of vllm": ratio})
    report("serving-beside", f"Serving while the model learns, {title}", rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(measure(Path(scratch)))


if __name__ == "__main__":
    main()
