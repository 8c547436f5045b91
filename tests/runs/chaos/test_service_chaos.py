"""A service survives the death of each of its processes while clients teach and ask.

    make chaos    # 200 kills instead of 30

No acknowledged record is lost or trained twice, no answer is of a release that was not served, and the service is back
within a minute. SERVICE_KILLS sets the number of kills, CHAOS_SEED the random choices.
"""

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.fakes.tiny import make_tiny_model
from tests.runs.leftovers import new_since, on_machine
from tests.runs.service import RunningService, demonstrations, write_service

KILLS = int(os.environ.get("SERVICE_KILLS", "30"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
EPOCHS = 2
BACK_S = 60  # limit of the time from the death of the service to the first engine
SETTLE_S = 300
FEW = KILLS <= 30
PAUSES = (0.3, 1.0) if FEW else (0.5, 3.0)  # seconds between two rounds
TEACH_EVERY_S = 0.5 if FEW else 0.25  # few kills leave time for few records
AT_ONCE = (2, 3) if FEW else (1, 2, 3)  # kinds of processes that are killed in one round; one of these numbers
SPARED = 0.85 if FEW else 0.0  # share of the rounds without the service itself, whose start takes longest
NAMES = {
    "engine": "engine_process",
    "engine's core": "EngineCore",
    "driver": "services.cli train",
    "rank": "LearnerWorker",
}


class Clients:
    """Teaches and asks until it is stopped. A request without an answer is sent again, under the same key."""

    def __init__(self, service: RunningService) -> None:
        self._service, self._stop = service, threading.Event()
        self.acknowledged: dict[str, str] = {}  # key -> id of the record
        self.answers: Counter[tuple[int, str]] = Counter()  # release and text
        self.tries = 0
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._teach, self._ask)]
        for thread in self._threads:
            thread.start()

    def _teach(self) -> None:
        number = 0
        while not self._stop.is_set():
            key, row = f"key-{number}", demonstrations(number, 1)[0]
            if self._try(lambda key=key, row=row: self._acknowledge(key, row)):  # type: ignore[misc]
                number += 1
            time.sleep(TEACH_EVERY_S)

    def _acknowledge(self, key: str, row: dict[str, str]) -> None:
        with httpx.Client(base_url=self._service.url, timeout=30) as http:
            answer = http.post("/v1/demonstrations", json=row, headers={"Idempotency-Key": key})
        answer.raise_for_status()
        (self.acknowledged[key],) = answer.json()["ids"]

    def _ask(self) -> None:
        while not self._stop.is_set():
            self._try(self._answer)
            time.sleep(0.1)

    def _answer(self) -> None:
        messages = [{"role": "user", "content": "Say number 3."}]
        body = {"model": "sdft", "messages": messages, "max_tokens": 8, "temperature": 0}
        with httpx.Client(base_url=self._service.url, timeout=60) as http:
            answer = http.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        text = answer.json()["choices"][0]["message"]["content"]
        self.answers[int(answer.headers["x-sdft-release"]), text] += 1

    def _try(self, work: Callable[[], None]) -> bool:
        self.tries += 1
        try:
            work()
        except httpx.HTTPError:
            return False
        return True

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive()


def victims(service: RunningService) -> dict[str, list[psutil.Process]]:
    """Return the processes of the service that run now, by kind."""
    found: dict[str, list[psutil.Process]] = {"service": [psutil.Process(service.process.pid)]}
    for process in found["service"][0].children(recursive=True):
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            for kind, name in NAMES.items():
                if name in words:
                    found.setdefault(kind, []).append(process)
    return found


@pytest.mark.timeout(600 + 15 * KILLS)
def test_no_record_is_lost_or_trained_twice(tmp_path: Path) -> None:
    before, choice = on_machine(), random.Random(SEED)
    config = write_service(tmp_path, make_tiny_model(tmp_path / "model"), window={"epochs": EPOCHS, "min_records": 8})
    service = RunningService(config, tmp_path / "runs")
    killed: Counter[str] = Counter()
    back: list[float] = []
    try:
        clients = Clients(service)
        while killed.total() < KILLS:
            time.sleep(choice.uniform(*PAUSES))
            running = victims(service)
            if choice.random() < SPARED:
                del running["service"]
            for kind in choice.sample(sorted(running), min(choice.choice(AT_ONCE), len(running))):
                with suppress(psutil.NoSuchProcess):
                    choice.choice(running[kind]).send_signal(signal.SIGKILL)
                    killed[kind] += 1
            with suppress(subprocess.TimeoutExpired):
                service.process.wait(0.5)  # after a kill
            if service.process.poll() is not None:
                since = time.monotonic()
                service.start()
                back.append(time.monotonic() - since)
        wait(lambda: len({number for number, _ in clients.answers}) > 1, "answers of two releases", service)
        clients.stop()
        wait(lambda: settled(service), "no window to be open", service)
        check(service, clients)
        print(f"{dict(killed)}; back after {sorted(round(s) for s in back)} s; {clients.tries} requests")
        assert max(back, default=0) < BACK_S
        service.stop()
    finally:
        service.close()
    assert new_since(before) == set()


def settled(service: RunningService) -> bool:
    """Return whether no window is open or undecided, and fewer records wait than a window needs."""
    status = service.get("status")
    return bool(status["doing"].startswith("waits for records") and status["ready"])


def wait(holds: Callable[[], bool], what: str, service: RunningService) -> None:
    until = time.monotonic() + SETTLE_S
    while not holds():
        assert time.monotonic() < until, f"waited {SETTLE_S} s for {what}: {service.log.read_text()[-3000:]}"
        time.sleep(0.5)


def check(service: RunningService, clients: Clients) -> None:
    """Compare what clients got with what the service has."""
    ids = list(clients.acknowledged.values())
    assert len(set(ids)) == len(ids)
    # One more may be there: the last one, if the client was stopped before its acknowledgement came.
    assert service.get("status")["received"] - len(ids) in (0, 1)
    for key, record in clients.acknowledged.items():
        row = service.get(f"records/{record}")
        assert row["prompt"] == demonstrations(int(key.removeprefix("key-")), 1)[0]["prompt"]
        assert row["state"] in ("waiting", "trained"), row
        if row["state"] == "trained":
            assert len(row["steps"]) == EPOCHS, row  # once in each epoch of one window
    texts = Counter(number for number, _ in clients.answers)
    assert len(texts) > 1  # answers of several releases came
    assert set(texts.values()) == {1}, clients.answers  # one greedy answer of each
    releases = {r["id"]: r for r in service.get("releases")["releases"]}
    assert {number for number, _ in clients.answers} <= {n for n, r in releases.items() if r["served_at"] is not None}
    audit = service.command("records", "--audit")
    assert audit.returncode == 0, audit.stdout + audit.stderr
