"""What it costs that one engine answers and makes a window's rollouts and scores in turns, beside engines of its own.

    python -m benchmarks.turns

Each service of the example gets the same demonstrations and trains one window, while an application asks one short
question after the other. Memory is the largest sum over the service's processes, each with its share of common pages.
"""

import asyncio
import json
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from benchmarks.measure import report
from benchmarks.serving import EXAMPLE, service

TOKENS, PAUSE_S, LIMIT_S = 16, 0.5, 1800
ROWS = EXAMPLE.parent.parent / "tools" / "train.jsonl"
CASES = {"engines of its own": False, "in turns": True}


async def asking(url: str, waits: list[float], failed: list[str]) -> None:
    """Ask until cancelled. Notes the seconds of each answer."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S)
    messages: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    while True:
        since = time.monotonic()
        try:
            await client.chat.completions.create(model="sdft", messages=messages, max_tokens=TOKENS)
        except openai.OpenAIError as error:
            failed.append(str(error))
        waits.append(time.monotonic() - since)
        await asyncio.sleep(PAUSE_S)


async def memory(largest: list[float]) -> None:
    """Note the largest memory of all processes that this one has started until cancelled, in GiB."""
    while True:
        largest[0] = max(largest[0], await asyncio.to_thread(held))
        await asyncio.sleep(5)  # a look takes a tenth of a second of a core


def held() -> float:
    """Return the GiB that all processes that this one has started hold."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            total += process.memory_full_info().pss
    return total / 2**30


async def window(url: str) -> float:
    """Train one window. Returns its seconds from the demonstrations to the gate's decision."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()[:72]]
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        since = time.monotonic()
        (await http.post("/v1/demonstrations", json=rows)).raise_for_status()
        async with asyncio.timeout(LIMIT_S):
            while not await decided(http):
                await asyncio.sleep(1)
        return time.monotonic() - since


async def decided(http: httpx.AsyncClient) -> bool:
    """Whether the gate has decided on the window's release."""
    newest = (await http.get("/v1/releases")).json()["releases"][0]
    return bool(newest["id"] > 1 and newest["status"] != "candidate")


async def measured(folder: Path, name: str, turns: bool) -> dict[str, Any]:
    """Measure one service."""
    largest = [0.0]
    waits: list[float] = []
    failed: list[str] = []
    watch = asyncio.create_task(memory(largest))
    async with service(folder, f"turns-{turns}", service__serving__turns=turns) as url:
        ask = asyncio.create_task(asking(url, waits, failed))
        seconds = await window(url)
        ask.cancel()
    watch.cancel()
    waits.sort()
    return {
        "a window's engines": name,
        "window s": seconds,
        "GiB": largest[0],
        "answers": len(waits),
        "median s": statistics.median(waits),
        "95 % below s": waits[int(0.95 * len(waits))],
        "longest s": waits[-1],
        "failed": len(failed),
    }


async def measure(folder: Path) -> None:
    rows = [await measured(folder, name, turns) for name, turns in CASES.items()]
    report("turns", "SmolLM2-135M: a window of the service example while an application asks", rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(measure(Path(scratch)))


if __name__ == "__main__":
    main()
