"""A small service for tests: its files, its process, and what a test asks of it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.runs.run import ENVIRONMENT

START_S = 120
DECIDE_S = 240


def write_service(folder: Path, model: Path, **service: Any) -> Path:
    """Write a service whose windows are short. service: further keys of its section."""
    questions = [{"prompt": f"Say number {i}.", "answer": "Yes."} for i in range(8)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    settings: dict[str, Any] = {
        "http": {"port": 0},
        "serving": {"kv_cache_gib": 0.1, "max_model_len": 1024, "max_num_seqs": 8},
        "window": {"min_records": 8, "epochs": 8, "held_out": 0.0, "replay": 0.0},
        "gate": {"promote_below": 0.4},
    }
    for key, value in service.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    config = {
        "model": str(model),
        "dtype": "float32",
        "data": {"template": "turn", "max_prompt_tokens": 100, "max_teacher_prompt_tokens": 300},
        "sampling": {"max_new_tokens": 100},
        "training": {"batch_size": 4},
        "method": "sft",
        "learner": {"optimizer": {"lr": 5e-3, "warmup_steps": 2}},
        "actors": {} if settings["serving"].get("turns") else {"student": {"kv_cache_gib": 0.05}},
        "evaluation": {"sets": [{"name": "numbers", "file": "eval.jsonl", "grader": "exact", "max_new_tokens": 16}]},
        "service": settings,
    }
    path = folder / "service.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def demonstrations(first: int = 0, count: int = 8, text: str = "Yes.") -> list[dict[str, Any]]:
    return [{"prompt": f"Say number {i}.", "demonstration": text} for i in range(first, first + count)]


class AskedService:
    """A service that runs, as its clients see it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.http = httpx.Client(timeout=60)

    def said(self) -> str:
        """Return what the service has printed, for messages."""
        return ""

    def check_running(self) -> None:
        """Raise AssertionError if the service has ended."""

    def connect(self) -> None:
        """Wait until an engine takes requests."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            self.check_running()
            if (self.folder / "service.json").exists():
                self.url = json.loads((self.folder / "service.json").read_text())["url"]
                self.http.base_url = self.url
                if self.http.get("/readyz").status_code == 200:
                    return
            time.sleep(0.1)
        raise TimeoutError(f"the service was not ready within {START_S} s: {self.said()}")

    def get(self, path: str) -> Any:
        answer = self.http.get(f"/v1/{path}")
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: Any = None, key: str | None = None) -> Any:
        answer = self.http.post(f"/v1/{path}", json=body, headers={"Idempotency-Key": key} if key else {})
        answer.raise_for_status()
        return answer.json()

    def ask(self, text: str, tokens: int = 16) -> tuple[int, str]:
        """Return the release that answered, and its greedy answer."""
        body = {
            "model": "sdft",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
        }
        answer = self.http.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return int(answer.headers["x-sdft-release"]), answer.json()["choices"][0]["message"]["content"]

    def decided(self, release: int) -> dict[str, Any]:
        """Wait until a release is served, held or refused."""
        until = time.monotonic() + DECIDE_S
        while time.monotonic() < until:
            found = self.http.get(f"/v1/releases/{release}")
            if found.status_code == 200 and found.json()["status"] not in ("candidate",):
                return dict(found.json())
            time.sleep(0.2)
        raise TimeoutError(f"release {release} was not decided: {self.said()}")

    def doing(self, what: str) -> None:
        """Wait until the service does something."""
        until = time.monotonic() + DECIDE_S
        while time.monotonic() < until:
            if self.get("status")["doing"].startswith(what):
                return
            time.sleep(0.05)
        raise TimeoutError(f"the service did not come to: {what}: {self.said()}")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run an sdft command on the service's folder."""
        command = [sys.executable, "-m", "sdft.services.cli", words[0], str(self.folder), *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


class RunningService(AskedService):
    """A service in a process of its own."""

    def __init__(self, target: Path, folder: Path, *more: str, environment: dict[str, str] = ENVIRONMENT) -> None:
        """target: what `sdft serve` is given. folder: of the service. more: further words of the command."""
        super().__init__(folder)
        self._target, self._more, self._environment = target, more, environment
        self.start()

    def start(self) -> None:
        """Start the process, and wait until an engine takes requests."""
        (self.folder / "service.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "sdft.services.cli", "serve", str(self._target), "--run-dir", str(self.folder)]
        self.folder.parent.mkdir(exist_ok=True)
        self.log = self.folder.with_suffix(".log")
        with self.log.open("a") as file:
            self.process = subprocess.Popen([*command, *self._more], stdout=file, stderr=file, env=self._environment)
        self.connect()

    def said(self) -> str:
        return self.log.read_text()

    def check_running(self) -> None:
        assert self.process.poll() is None, self.said()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
