"""A service and an application that teaches it: `make service`.

    starts `sdft serve` ─► asks ─► wrong tool calls ─► posts corrections ─► release 2
                        ─► posts poisoned demonstrations ─► refused ─► rolls back

The application asks on in all of that, and no request may fail.
"""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from sdft.services.grading.graders.tool_call import grade

HERE = Path(__file__).parent
TRAIN = HERE.parent / "tools" / "train.jsonl"
MODEL = "sdft"
QUESTIONS = 72  # as many as a window needs records
AT_ONCE = 8  # questions of the application
LIMIT_S = 1500  # of each wait
PAUSE_S = 0.5  # between two questions while the model learns


class Application:
    """Asks through OpenAI's client, and counts what it gets."""

    def __init__(self, url: str) -> None:
        self.openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self.http = httpx.AsyncClient(base_url=f"{url}/v1", timeout=120)
        self.answers: Counter[str] = Counter()  # by release
        self.failures: list[str] = []

    async def ask(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return the receipt and the text of an answer."""
        messages = [{"role": "user", "content": row["prompt"]}]
        raw = await self.openai.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=48,
            temperature=0,
        )
        answer = raw.parse()
        self.answers[raw.headers["x-sdft-release"]] += 1
        return answer.id, answer.choices[0].message.content or ""

    async def ask_on(self, rows: list[dict[str, Any]]) -> None:
        """Ask until cancelled."""
        while True:
            for row in rows:
                try:
                    await self.ask(row)
                except Exception as error:  # noqa: BLE001 - counted, and shown at the end
                    self.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(PAUSE_S)

    async def status(self) -> dict[str, Any]:
        return dict((await self.http.get("/status")).json())

    async def release(self, number: int) -> dict[str, Any] | None:
        answer = await self.http.get(f"/releases/{number}")
        return dict(answer.json()) if answer.status_code == 200 else None


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def accuracy(release: dict[str, Any], key: str) -> str:
    return ", ".join(f"{s['name']} {100 * s[key]:.1f} % (n {s['n']})" for s in release["sets"])


async def teach(application: Application, rows: list[dict[str, Any]]) -> int:
    """Ask every question, and post a correction for each wrong answer. Returns how many were wrong."""
    turn, wrong = asyncio.Semaphore(AT_ONCE), 0

    async def one(row: dict[str, Any]) -> None:
        nonlocal wrong
        async with turn:
            receipt, text = await application.ask(row)
            if grade(text, row["answer"]):
                return
            wrong += 1
            body = {"receipt": receipt, "correction": row["demonstration"]}
            (
                await application.http.post("/feedback", json=body, headers={"Idempotency-Key": row["id"]})
            ).raise_for_status()

    await asyncio.gather(*map(one, rows))
    return wrong


async def decided(application: Application, number: int) -> dict[str, Any]:
    """Wait until release `number` is served, held or refused; show what the service does meanwhile."""
    shown, until = "", time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        status = await application.status()
        window = status["window"]
        doing = status["doing"]
        if window and window["steps"]:
            doing += f": step {window['step'] // 6 * 6} of {window['steps']}"
        if doing != shown:
            say(f"  service: {doing}")
            shown = doing
        release = await application.release(number)
        if release is not None and release["status"] in ("served", "held", "refused"):
            return release
        await asyncio.sleep(1)
    raise TimeoutError(f"release {number} was not decided within {LIMIT_S} s; see {shown}")


def poisoned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same questions with calls of a tool that is not offered."""
    call = 'Action: deleteAccount\nAction Input: {"user": "all"}'
    return [{"prompt": row["prompt"], "demonstration": call} for row in rows]


async def demonstrate(url: str) -> int:
    application = Application(url)
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()][:QUESTIONS]
    say(f"asking {len(rows)} questions")
    wrong = await teach(application, rows)
    status = await application.status()
    say(f"{wrong} of {len(rows)} tool calls were wrong; corrections posted, records received: {status['received']}")
    asking = asyncio.create_task(application.ask_on(rows))
    try:
        second = await decided(application, 2)
        say(f"gate: {second['verdict']} release 2; it is {second['status']}")
        say(f"  release 1: {accuracy(second, 'before')}")
        say(f"  release 2: {accuracy(second, 'now')}")
        if second["status"] != "served":
            return 1
        body = "".join(json.dumps(row) + "\n" for row in poisoned(rows))
        kind = {"Content-Type": "application/jsonl", "Idempotency-Key": "poison"}
        (await application.http.post("/demonstrations", content=body, headers=kind)).raise_for_status()
        say(f"posted {len(rows)} poisoned demonstrations")
        third = await decided(application, 3)
        counts = (await application.status())["counts"]
        say(f"gate: {third['verdict']} release 3: {third['reason']}")
        say(f"  records: {', '.join(f'{n} {state}' for state, n in counts.items() if n)}")
        if third["status"] != "refused":
            say("the gate should have refused the poisoned release")
            return 1
        back = (await application.http.post("/releases/2/rollback")).raise_for_status().json()
        say(f"rolled back: release {back['id']} is served")
        await asyncio.sleep(2 * PAUSE_S + 1)
        again = (await application.http.post("/releases/2/promote")).raise_for_status().json()
        say(f"promoted again: release {again['id']} is served")
        await asyncio.sleep(2 * PAUSE_S + 1)
    finally:
        asking.cancel()
    answers = ", ".join(f"{n} of release {release}" for release, n in sorted(application.answers.items()))
    say(f"answers: {answers}; failed requests: {len(application.failures)}")
    for failure in application.failures:
        print(failure)
    return 1 if application.failures else 0


@asynccontextmanager
async def service(folder: Path, *more: str) -> AsyncIterator[str]:
    """Run `sdft serve` and yield its address once it answers."""
    command = [sys.executable, "-m", "sdft.services.cli", "serve", str(HERE / "service.yaml"), "--run-dir", str(folder)]
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen([*command, *more], stdout=file, stderr=file)
        try:
            async with asyncio.timeout(300), httpx.AsyncClient() as http:
                while True:
                    if process.poll() is not None:
                        raise SystemExit(f"sdft serve ended with exit code {process.returncode}: {log.read_text()}")
                    if (folder / "service.json").exists():
                        url = json.loads((folder / "service.json").read_text())["url"]
                        try:
                            if (await http.get(f"{url}/readyz")).status_code == 200:
                                break
                        except httpx.TransportError:
                            pass
                    await asyncio.sleep(0.2)
            yield url
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


async def main() -> int:
    folder = Path("runs/service")
    if folder.exists():
        raise SystemExit(f"{folder} exists already; remove it, or go on with it: sdft serve {folder}")
    say("starting the service: sdft serve examples/service/service.yaml")
    async with service(folder) as url:
        say(f"it answers; page: {url}")
        code = await demonstrate(url)
        report = folder / "windows" / "0001" / "run" / "report.html"
        say(f"report of the first window: {report}; go on with the service: sdft serve {folder}, page {url}")
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
