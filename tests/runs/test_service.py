"""A whole service with one engine in turns: asked through the openai client, taught, trained, gated, rolled back."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes.tiny import make_tiny_model
from tests.papers.documents import README, ROOT, block, blocks
from tests.runs.bad_requests import BAD, Bad
from tests.runs.leftovers import new_since, on_machine
from tests.runs.run import ENVIRONMENT
from tests.runs.service import RunningService, demonstrations, write_service


@pytest.fixture(scope="module")
def before() -> set[str]:
    """What was on the machine before the service: clusters of other tests, for instance."""
    return on_machine()


@pytest.fixture(scope="module")
def service(before: set[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("service")
    http, serving = {"port": 0, "max_body_mib": 2}, {"turns": True}
    config = write_service(folder, make_tiny_model(folder / "model"), http=http, serving=serving)
    running = RunningService(config, folder / "runs")
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def client(service: RunningService) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


def say(number: int) -> list[Any]:
    return [{"role": "user", "content": f"Say number {number}."}]


def test_the_openai_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sdft"]
    raw = client.chat.completions.with_raw_response.create(
        model="sdft", messages=say(3), max_tokens=8, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}
    )
    answer = raw.parse()
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len((logprobs.content or [])[0].top_logprobs) == 3
    assert raw.headers["x-sdft-release"] == "1"
    assert raw.headers["x-sdft-weights"] == "as started"
    assert raw.headers["x-sdft-receipt"] == answer.id
    completion = client.completions.create(model="sdft", prompt="Say", max_tokens=3)
    assert completion.choices[0].finish_reason in ("length", "stop")
    streamed = client.chat.completions.create(
        model="sdft", messages=say(3), max_tokens=9, stream=True, extra_body={"ignore_eos": True}
    )
    assert len({chunk.id for chunk in streamed}) == 1
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=say(3))
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="sdft", messages=say(3), max_tokens=10**6)


def test_anthropic_messages(service: RunningService) -> None:
    body = {"model": "sdft", "messages": say(3), "max_tokens": 4}
    answer = service.http.post("/v1/messages", json=body)
    assert answer.status_code == 200
    assert answer.json()["type"] == "message"
    assert answer.headers["x-sdft-release"] == "1"


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.method} {bad.path} {bad.status} {bad.said[:30]}")
def test_bad_requests(service: RunningService, bad: Bad) -> None:
    """Each has its status, code and sentence, in the form of OpenAI's errors, and leaves nothing behind."""
    body = {"content": bad.body} if isinstance(bad.body, bytes) else {"json": bad.body} if bad.body is not None else {}
    headers = {"Content-Type": "application/json"} | bad.headers if "content" in body else bad.headers
    answer = service.http.request(bad.method, bad.path, headers=headers, **body)
    error = answer.json()["error"]
    assert (answer.status_code, bad.said in error["message"]) == (bad.status, True), error
    assert error["type"]
    if bad.code is not None:
        assert error["code"] == bad.code
    assert service.get("status")["received"] == 0


def test_a_record_counts_once(service: RunningService) -> None:
    row = [{"prompt": "Wait.", "demonstration": "Waiting."}]
    first = service.post("demonstrations", row, key="one")
    assert service.post("demonstrations", row, key="one") == first
    other = service.http.post("/v1/demonstrations", json=demonstrations(0, 1), headers={"Idempotency-Key": "one"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "key_used")
    (record,) = first["ids"]
    assert service.get(f"records/{record}")["state"] == "waiting"
    deleted = service.http.delete(f"/v1/records/{record}").json()
    assert (deleted["state"], deleted["releases"]) == ("deleted", [])


def test_feedback(service: RunningService, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="sdft", messages=say(0), max_tokens=4)
    assert service.post("feedback", {"receipt": answer.id, "score": 0})["counted"] == ["score"]
    assert service.post("feedback", {"receipt": answer.id, "comment": "too short"})["counted"] == ["comment"]
    (record,) = service.post("feedback", {"receipt": answer.id, "correction": "Yes."})["ids"]
    row = service.get(f"records/{record}")["row"]
    assert (row["prompt"], row["demonstration"], row["receipt"]) == (say(0), "Yes.", answer.id)
    assert service.get("status")["feedback"] == {"score": 1, "comment": 1, "correction": 1}
    streamed = list(client.chat.completions.create(model="sdft", messages=say(1), max_tokens=4, stream=True))
    (record,) = service.post("feedback", {"receipt": streamed[0].id, "correction": "Yes."})["ids"]
    assert service.get(f"records/{record}")["row"]["prompt"] == say(1)


async def _streams(url: str, until: "asyncio.Event") -> list[tuple[str, str]]:
    """Stream long greedy answers one after the other until the event. Returns the release and the text of each."""
    client, got = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), []
    while not until.is_set():
        raw = await client.chat.completions.with_raw_response.create(
            model="sdft", messages=say(5), max_tokens=150, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        text = ""
        async for chunk in raw.parse():
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        got.append((raw.headers["x-sdft-release"], text))
    await client.close()
    return got


def test_streams_live_through_a_promotion(service: RunningService) -> None:
    """Records become release 2 while streams go on; each answer is one release's own, to the last token."""

    async def run() -> tuple[list[tuple[str, str]], dict[str, Any]]:
        until = asyncio.Event()
        streams = [asyncio.create_task(_streams(service.url, until)) for _ in range(2)]
        await asyncio.to_thread(service.post, "demonstrations", demonstrations(2, 6))
        release = await asyncio.to_thread(service.decided, 2)
        await asyncio.sleep(1)
        until.set()
        return [answer for stream in streams for answer in await stream], release

    answers, release = asyncio.run(run())
    assert release["status"] == "served", release
    assert {number for number, _ in answers} == {"1", "2"}
    assert len({text for number, text in answers if number == "1"}) == 1
    assert len({text for number, text in answers if number == "2"}) == 1
    assert len(set(answers)) == 2
    assert service.ask("Say number 3.") == (2, "Yes.")


def test_what_became_of_a_record(service: RunningService) -> None:
    record = service.get("records/rec-4")
    assert (record["state"], record["window"], record["release"]) == ("trained", 1, 2)
    assert len(record["steps"]) == 8  # once in each epoch
    deleted = service.http.delete("/v1/records/rec-4").json()
    assert (deleted["state"], deleted["releases"]) == ("trained", [2])
    listed = service.get("records?state=trained&limit=3")
    assert [row["id"] for row in listed["records"]] == ["rec-8", "rec-7", "rec-6"]
    assert sum(listed["counts"].values()) == 9


def test_a_poisoned_window_is_refused(service: RunningService) -> None:
    service.post("demonstrations", demonstrations(0, 8, "No."))
    release = service.decided(3)
    assert release["status"] == "refused", release
    assert "numbers" in release["reason"]
    assert service.ask("Say number 3.") == (2, "Yes.")
    assert service.get("records")["counts"]["quarantined"] == 8
    audit = service.command("records", "--audit")
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert "every record is in one state" in audit.stdout


def test_rollback_and_promotion(service: RunningService) -> None:
    done = service.command("rollback")
    assert (done.returncode, done.stdout) == (0, "release 1 is served\n"), done.stderr
    assert service.ask("Say number 3.")[0] == 1
    assert service.get("records/rec-5")["state"] == "quarantined"
    first = service.http.post("/v1/releases/1/rollback")
    assert (first.status_code, first.json()["error"]["code"]) == (409, "not_possible")
    assert service.command("promote", "2").stdout == "release 2 is served\n"
    assert service.ask("Say number 3.") == (2, "Yes.")
    assert service.get("records/rec-5")["state"] == "trained"
    assert service.http.post("/v1/releases/2/hold").json()["error"]["message"].startswith("release 2 is served; only")
    assert service.http.post("/v1/releases/9/promote").status_code == 404
    assert service.post("releases/1/pin")["pinned"]
    shown = service.command("releases").stdout.splitlines()
    assert [line.split()[:2] for line in shown] == [["3", "refused"], ["2", "served"], ["1", "earlier"]]


def test_a_second_service_is_refused(service: RunningService) -> None:
    command = [sys.executable, "-m", "sdft.services.cli", "serve", str(service.folder), "--set", "service.http.port=0"]
    second = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert second.returncode == 2, second.stderr
    assert "another service runs in this folder" in second.stderr


def test_the_tutorial_does_what_it_says(service: RunningService, tmp_path: Path) -> None:
    """The commands in docs/service.md are unchanged, except the address, the receipt and the folder."""
    (tmp_path / "my.jsonl").write_text(block('{"prompt": "Turn off', README) * 2)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "my").symlink_to(service.folder)

    def run(text: str) -> str:
        words = ["bash", "-c", text.replace("http://127.0.0.1:8000", service.url)]
        done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    page = ROOT / "docs" / "service.md"
    assert "sdft serve my.yaml" in blocks(page)
    asked, corrected, commented, said_next, taught = (text for text in blocks(page) if text.startswith("curl "))
    receipt = json.loads(run(asked))["id"]
    assert json.loads(run(corrected.replace("chatcmpl-...", receipt))) == {"ids": ["rec-17"]}
    counted = {"ids": [], "counted": ["comment"]}  # this service's method has no teacher that could see a comment
    assert json.loads(run(commented.replace("chatcmpl-...", receipt))) == counted
    assert json.loads(run(said_next.replace("chatcmpl-...", receipt))) == {"ids": [], "counted": ["next_message"]}
    assert json.loads(run(taught)) == {"ids": ["rec-18", "rec-19"]}
    shown, listed, audited, *_ = block("sdft status", page).splitlines()
    assert f"service     runs at {service.url}" in run(shown)
    assert "served" in run(listed)
    assert "every record is in one state" in run(audited)
    token = run(block("sdft tokens", page)).splitlines()[0]
    assert token.startswith("sdft-")
    assert token not in (tmp_path / "tokens.json").read_text()


def test_a_stop_leaves_nothing(service: RunningService, before: set[str]) -> None:
    assert service.stop() == 130
    assert not (service.folder / "service.json").exists()
    assert new_since(before) == set()
    status = service.command("status").stdout.splitlines()
    assert status[0].split() == ["service", "does", "not", "run"]
    assert "2 is served (window 1, 16 steps); 3 releases" in status[1]
    assert "20 received: " in status[-1]
    refused = service.command("rollback")
    assert refused.returncode == 3
    assert "the service does not run; start it by `sdft serve" in refused.stderr
    assert service.command("records").stdout.splitlines()[-1].split() == ["received", "20"]
