"""A judge with OpenAI's protocol, such as vLLM's server: its requests, its verdicts, and the errors if it fails."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sdft.services.base.errors import PreflightError, UserError
from sdft.services.config.evaluation import JudgeConfig
from sdft.services.grading.judge import check_judge, judged, verdict
from tests.runs.run import free_port


class Endpoint(BaseHTTPRequestHandler):
    """A judge that replies yes if the reply contains the reference answer. `says` replaces that reply."""

    says: str | None = None
    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "us"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"key": self.headers["Authorization"]})
        content = body["messages"][0]["content"]
        parts = re.search(r"Reference answer:\n(.*)\n\nReply:\n(.*)\n\nIs the", content, re.DOTALL)
        assert parts is not None
        said = self.says or ("Yes." if parts[1] in parts[2] else "no")
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self._send({"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]})

    def _send(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[JudgeConfig]:
    Endpoint.says, Endpoint.asked = None, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])  # its `shutdown` waits for a poll
    thread.start()
    yield JudgeConfig(url=f"http://127.0.0.1:{server.server_port}/v1", model="judge", concurrency=3, timeout_s=20)
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_judge_that_is_gone_ends_the_evaluation_in_a_sentence() -> None:
    gone = JudgeConfig(url=f"http://127.0.0.1:{free_port()}/v1", model="judge", timeout_s=5)
    with pytest.raises(PreflightError, match=r"the judge judge at .* does not answer any more .*start the judge again"):
        asyncio.run(judged(gone, [("What?", "that", "That.")] * 3))


def test_replies_are_judged_in_their_order(endpoint: JudgeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    items = [(f"What is number {i}?", str(i), f"It is {i if i % 3 else 'unknown'}.") for i in range(20)]
    assert asyncio.run(judged(endpoint, items)) == [i % 3 > 0 for i in range(20)]
    assert len(Endpoint.asked) == 20
    assert {(body["temperature"], body["max_tokens"], body["key"]) for body in Endpoint.asked} == {
        (0, 16, "Bearer secret")
    }
    assert any("Question:\nWhat is number 7?\n" in body["messages"][0]["content"] for body in Endpoint.asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", True),
        (" **No**, it is not", False),
        ("<think>yes or no? no...</think>\n\nYes.", True),
        ("Yesterday", None),
        ("The reply is right", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_first_word_after_any_thinking(text: str, expected: bool | None) -> None:
    assert verdict(text) is expected


def test_a_judge_that_does_not_judge_is_named(endpoint: JudgeConfig) -> None:
    Endpoint.says = "It depends"
    with pytest.raises(UserError, match=r"the judge judge at http.* answered neither yes nor no for 2 of 2 replies"):
        asyncio.run(judged(endpoint, [("q", "a", "r")] * 2))


def test_a_judge_is_checked_before_a_run_starts(endpoint: JudgeConfig) -> None:
    check_judge("q", endpoint)
    with pytest.raises(PreflightError, match=r"evaluation set q: the judge at http.* does not serve other; .*: judge"):
        check_judge("q", endpoint.model_copy(update={"model": "other"}))
    nowhere = endpoint.model_copy(update={"url": "http://127.0.0.1:9/v1"})
    with pytest.raises(PreflightError, match=r"evaluation set q: no judge answers at http://127\.0\.0\.1:9/v1"):
        check_judge("q", nowhere)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_a_judge_on_this_machine_is_asked_without_the_proxy_of_the_environment(
    proxy: str, endpoint: JudgeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    check_judge("q", endpoint)
    assert asyncio.run(judged(endpoint, [("q", "a", "a")])) == [True]


def test_a_proxy_that_cannot_be_used_is_named(endpoint: JudgeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "telnet://user:secret@proxy:1080")
    far = endpoint.model_copy(update={"url": "http://judge.invalid:8000/v1"})
    with pytest.raises(PreflightError, match=r"cannot be reached through the proxy .* \(ALL_PROXY=proxy:1080\)"):
        check_judge("q", far)


@pytest.mark.parametrize(
    "url", ["http://[::1]:8000/v1", "https://api.example.com/v1", "http://judge:8000", "http://a/"]
)
def test_addresses_that_a_judge_may_have(url: str) -> None:
    assert JudgeConfig(url=url, model="m").url == url


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "localhost:8000", "ws://a/v1", "http://::1:8000/v1", "http:///v1"]
)
def test_what_is_no_address_of_a_judge_is_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not the address of an API; write it as http://HOST:8000/v1"):
        JudgeConfig(url=url, model="m")
