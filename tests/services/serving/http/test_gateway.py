"""The gateway over real HTTP, with engines of a few lines: tokens, limits, lost engines, slow clients, a full disk."""

import asyncio
import os
import signal
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from sdft.services.serving.start import Checked
from sdft.services.serving.tokens import add_token
from tests.fakes.small_service import Client, checked_service, copied, running

MESSAGES = [{"role": "user", "content": "one two three"}]


@pytest.fixture(scope="module")
def checked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return checked_service(tmp_path_factory.mktemp("service"), tiny_model, http={"port": 0, "max_in_flight": 600})


def test_tokens_open_their_scopes_only(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    tokens = {scope: add_token(path, scope, [scope]) for scope in ("ask", "teach", "operate")}
    service = checked_service(tmp_path, tiny_model, http={"port": 0, "tokens": str(path)})
    requests = [
        ("ask", "POST", "/v1/chat/completions"),
        ("ask", "GET", "/v1/models"),
        ("teach", "POST", "/v1/demonstrations"),
        ("teach", "POST", "/v1/feedback"),
        ("teach", "GET", "/v1/records"),
        ("teach", "DELETE", "/v1/records/rec-0"),
        ("operate", "GET", "/v1/releases"),
        ("operate", "POST", "/v1/releases/1/promote"),
        ("operate", "POST", "/v1/releases/1/rollback"),
        ("operate", "POST", "/v1/windows/1/retry"),
        ("operate", "GET", "/v1/status"),
        ("operate", "GET", "/metrics"),
    ]

    async def run(client: Client) -> None:
        for scope, method, url in requests:
            for name, token in tokens.items():
                answer = await client.request(method, url, headers={"Authorization": f"Bearer {token}"})
                code = answer.json()["error"]["code"] if answer.status_code >= 400 else ""
                assert (answer.status_code == 403, code == "wrong_scope") == (name != scope,) * 2, (url, name, code)
            for headers, code in (({}, "missing_token"), ({"Authorization": "Bearer sdft-x"}, "unknown_token")):
                answer = await client.request(method, url, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
                assert answer.headers["www-authenticate"] == "Bearer"
        for url in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert (await client.get(url)).status_code == 200

    async def go() -> None:
        async with running(service) as client:
            await run(client)

    asyncio.run(go())


def test_an_answer_lives_through_a_change_of_release(checked: Checked, tmp_path: Path) -> None:
    """A stream that has begun ends with its release; requests that come meanwhile wait for the next one."""

    async def run() -> None:
        async with running(copied(checked, tmp_path / "run")) as client:
            await client.teach("yes", "yes", "yes", "yes")
            await client.release(2)
            body = {"messages": MESSAGES, "stream": True, "between_s": 0.3}
            async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
                assert stream.headers["x-sdft-release"] == "2"
                back = asyncio.create_task(client.post("/v1/releases/2/rollback"))
                await asyncio.sleep(0.3)
                later = asyncio.create_task(client.ask("Hi"))
                text = (await stream.aread()).decode()
            assert "one" in text
            assert text.endswith("data: [DONE]\n\n")
            assert (await back).json()["id"] == 1
            assert await later == "release 1: Hi"

    asyncio.run(run())


def test_a_lost_engine(checked: Checked, tmp_path: Path) -> None:
    """A request whose answer has not begun goes to the next engine; a stream that has begun ends with an error."""

    async def run() -> None:
        async with running(copied(checked, tmp_path / "run")) as client:
            waiting = asyncio.create_task(client.ask("Hi", wait_s=1))
            streaming = asyncio.create_task(
                client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True, "between_s": 1})
            )
            await asyncio.sleep(0.5)
            engine = (await client.got("status"))["engines"][0]
            assert engine["in_flight"] == 2
            os.kill(engine["pid"], signal.SIGKILL)
            assert await waiting == "release 1: Hi"
            assert '"code": "engine_lost"' in (await streaming).text
            status = await client.got("status")
            assert (status["engines"][0]["starts"], status["engines"][0]["in_flight"]) == (2, 0)

    asyncio.run(run())


def test_a_client_that_goes_away_ends_its_request(checked: Checked, tmp_path: Path) -> None:
    async def run() -> None:
        async with running(copied(checked, tmp_path / "run")) as client:
            body = {"messages": MESSAGES, "stream": True, "between_s": 2}
            async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
                lines = stream.aiter_lines()  # kept: the connection ends with the iterator
                await anext(lines)
                assert (await client.got("status"))["engines"][0]["in_flight"] == 1
            await client.until(lambda: idle(client))

    async def idle(client: Client) -> bool:
        return (await client.got("status"))["engines"][0]["in_flight"] == 0

    asyncio.run(run())


def test_a_good_score_keeps_the_answer(tiny_model: Path, tmp_path: Path) -> None:
    service = checked_service(tmp_path, tiny_model, feedback={"good_score": 0.5})

    async def run() -> None:
        async with running(service) as client:
            body = {"messages": MESSAGES}
            receipt = (await client.post("/v1/chat/completions", json=body)).json()["id"]
            for score, ids in ((0.4, []), (0.5, ["rec-0"]), (1, ["rec-0"])):
                headers = {"Idempotency-Key": "good" if ids else "bad"}
                answer = await client.post("/v1/feedback", json={"receipt": receipt, "score": score}, headers=headers)
                if score == 1:  # another body under the same key
                    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "key_used")
                    continue
                assert answer.json()["ids"] == ids
            row = (await client.got("records/rec-0"))["row"]
            assert (row["prompt"], row["demonstration"]) == (MESSAGES, "release 1: one two three")
            assert (await client.got("status"))["feedback"] == {"score": 2}

    asyncio.run(run())


def test_five_hundred_connections(checked: Checked, tmp_path: Path) -> None:
    async def run() -> None:
        async with running(copied(checked, tmp_path / "run")) as client:
            limits = httpx.Limits(max_connections=500)
            async with httpx.AsyncClient(base_url=client.base_url, limits=limits, timeout=60) as many:

                async def ask(number: int) -> str:
                    body = {"messages": [{"role": "user", "content": str(number)}], "wait_s": 0.5}
                    answer = await many.post("/v1/chat/completions", json=body)
                    return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])

                answers = await asyncio.gather(*map(ask, range(500)))
            assert answers == [f"release 1: {i}" for i in range(500)]

    asyncio.run(run())


def test_too_many_requests_get_429(tiny_model: Path, tmp_path: Path) -> None:
    service = checked_service(tmp_path, tiny_model, http={"port": 0, "max_in_flight": 2})

    async def run() -> None:
        async with running(service) as client:
            held = [asyncio.create_task(client.ask("Hi", wait_s=1)) for _ in range(2)]
            await asyncio.sleep(0.4)
            answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES})
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert await asyncio.gather(*held) == ["release 1: Hi"] * 2

    asyncio.run(run())


def test_back_pressure(tiny_model: Path, tmp_path: Path) -> None:
    """A full queue and a fast client get 429, with the time after which to send again."""
    http = {"port": 0, "max_waiting": 3, "max_per_minute": 40}
    service = checked_service(tmp_path, tiny_model, http=http, window={"min_records": 100})

    async def run() -> None:
        async with running(service) as client:
            await client.teach("a", "b", "c")
            answer = await client.post("/v1/demonstrations", json={"prompt": "Hi", "demonstration": "Ho"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            codes = [(await client.get("/v1/models")).status_code for _ in range(40)]
            assert codes[0] == 200
            last = await client.get("/v1/models")
            assert (last.status_code, last.json()["error"]["code"]) == (429, "too_fast")
            assert 0 < int(last.headers["retry-after"]) <= 61
            assert (await client.get("/healthz")).status_code == 200

    asyncio.run(run())


def test_an_answer_that_takes_too_long(tiny_model: Path, tmp_path: Path) -> None:
    service = checked_service(tmp_path, tiny_model, http={"port": 0, "request_timeout_s": 0.5})

    async def run() -> None:
        async with running(service) as client:
            answer = await client.post("/v1/chat/completions", json={"messages": MESSAGES, "wait_s": 5})
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
            stream = await client.post(
                "/v1/chat/completions", json={"messages": MESSAGES, "stream": True, "between_s": 5}
            )
            assert '"code": "timeout"' in stream.text

    asyncio.run(run())


def test_a_large_body_and_a_slow_one(checked: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdft.services.serving.http.requests.BODY_S", 0.5)

    async def run() -> None:
        async with running(copied(checked, tmp_path / "run")) as client:

            async def large() -> object:
                for _ in range(100):
                    yield b" " * (1 << 20)

            answer = await client.post("/v1/demonstrations", content=large())  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

            async def slow() -> object:
                yield b'{"prompt"'
                await asyncio.sleep(2)

            headers = {"Content-Type": "application/json"}
            answer = await client.post("/v1/demonstrations", content=slow(), headers=headers)  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["error"]["code"]) == (408, "slow_body")
            assert (await client.got("status"))["received"] == 0

    asyncio.run(run())


def test_a_full_disk_takes_nothing(checked: Checked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = copied(checked, tmp_path / "run")
    fsync = os.fsync

    def full(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("inbox.jsonl"):
            raise OSError(28, "No space left on device")
        fsync(fd)

    async def run() -> None:
        async with running(service) as client:
            with monkeypatch.context() as patched:
                patched.setattr(os, "fsync", full)
                rows = [{"prompt": "Hi", "demonstration": "Ho"}]
                answer = await client.post("/v1/demonstrations", json=rows, headers={"Idempotency-Key": "k"})
            assert answer.status_code == 507
            assert "No space left on device" in answer.json()["error"]["message"]
            assert service.folder.inbox.read_bytes() == b""
            assert await client.teach("Ho", key="k") == ["rec-0"]  # the key is free again

    asyncio.run(run())


def certificate_for_loopback(folder: Path) -> tuple[Path, Path]:
    """Write a self-signed certificate of 127.0.0.1 and its key; return their paths."""
    key = rsa.generate_private_key(65537, 2048)
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(*encoding))
    return paths


def test_https(tiny_model: Path, tmp_path: Path) -> None:
    certificate, key = certificate_for_loopback(tmp_path)
    tls = {"port": 0, "tls_certificate": str(certificate), "tls_key": str(key)}
    service = checked_service(tmp_path, tiny_model, http=tls)

    async def run() -> None:
        trusted = ssl.create_default_context(cafile=str(certificate))
        async with running(service, verify=trusted) as client:
            assert client.base_url.scheme == "https"
            assert await client.ask("Hi") == "release 1: Hi"

    asyncio.run(run())
