"""Bad input to `sdft serve` and to the commands that look at a service: one sentence, exit 2 or 3, nothing started."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.services.cli.main import main

pytestmark = pytest.mark.usefixtures("unexamined")


def write(folder: Path, model: Path, **more: Any) -> Path:
    """Write a service's configuration. more: sections that replace or join those of a valid one."""
    config = {"model": str(model), "training": {"batch_size": 2}, "service": {"http": {"port": 0}}}
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(config | more))
    return path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run a command; return its exit code, and the last line that it printed on standard error."""
    code = main(words)
    return code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"service": None, "data": {"train": "a.jsonl"}, "training": {"steps": 1}},
            "it has no section service; add `service: {}`",
        ),
        ({"data": {"format": "alpaca"}}, "a service takes rows in our columns; remove them"),
        ({"service": {"serving": {"max_model_len": 9999}}}, "max_model_len is 9999, but the model in"),
        (
            {"service": {"http": {"tls_certificate": "my.yaml", "tls_key": "my.yaml"}}},
            "are no certificate with its key",
        ),
        ({"service": {"http": {"tokens": "none.json"}}}, "none.json cannot be read"),
        (
            {"evaluation": {"sets": [{"name": "held-out-new", "file": "eval.jsonl", "grader": "exact"}]}},
            "held-out-new is the set of held-out records; choose another name",
        ),
        (
            {"evaluation": {"sets": [{"name": "texts", "file": "texts.jsonl", "grader": "perplexity"}]}},
            "the gate compares answers, and grader perplexity has none",
        ),
        ({"data": {"max_prompt_tokens": 1}}, "raise data.max_prompt_tokens to at least"),
        ({"service": {"http": {"port": 1, "host": "127.0.0.1"}}}, "the service cannot listen on 127.0.0.1, port 1"),
    ],
)
def test_configurations(
    more: dict[str, Any],
    expected: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "port" in str(more):  # root may listen on any port
        monkeypatch.setattr("socket.create_server", refuse)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "Hi", "answer": "Ho"}\n')
    (tmp_path / "texts.jsonl").write_text('{"text": "Hi, ho."}\n')
    path = write(tmp_path, tiny_model, **more)
    code, text = said(capsys, "serve", str(path), "--run-dir", str(tmp_path / "run"))
    assert (code, expected in text) == (2, True), text


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_service_is_no_run(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, tiny_model)
    for word in ("train", "check"):
        code, text = said(capsys, word, str(path))
        assert (code, text) == (2, f"sdft: {path}: it has the section service; start it by `sdft serve {path}`")
    address = ("--address", "http://127.0.0.1:1", "--run-dir", "/shared/x")
    code, text = said(capsys, "submit", str(path), *address)
    assert (code, text) == (2, f"sdft: {path}: it has the section service; add --serve")
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {tiny_model}\ndata: {{train: a.jsonl}}\ntraining: {{steps: 1}}\n")
    code, text = said(capsys, "submit", str(run), "--serve", *address)
    assert (code, text) == (2, f"sdft: {run}: it has no section service; remove --serve")


def test_folders_that_are_no_service(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("releases",), ("records",), ("rollback",), ("promote", "2")):
        code, text = said(capsys, words[0], str(tmp_path), *words[1:])
        assert (code, "no service in this folder" in text) == (2, True), text
    code, text = said(capsys, "serve", str(tmp_path))
    assert (code, "neither a service nor a run is in this folder" in text) == (2, True)
    (tmp_path / "config.yaml").write_text(f"model: {tiny_model}\ndata: {{train: a.jsonl}}\ntraining: {{steps: 1}}\n")
    code, text = said(capsys, "serve", str(tmp_path))
    assert (code, "has no checkpoint to serve" in text) == (2, True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    code, text = said(capsys, "serve", str(write(tmp_path, tiny_model)), "--run-dir", str(run))
    assert (code, "holds a run (metrics.jsonl); name another --run-dir" in text) == (2, True)


HELD = '{"kind": "held", "release": 9, "by": "", "reason": "", "at": 0}\n'  # of a release that is not there


@pytest.mark.parametrize("damage", ["x\n", '{"kind": "opened"}\n', HELD])
def test_damaged_files(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal.jsonl").write_text(damage)
    for word in ("releases", "records", "rollback"):
        code, text = said(capsys, word, str(tmp_path))
        assert (code, "journal.jsonl:1 is no decision of a service" in text) == (2, True), text
    (tmp_path / "journal.jsonl").write_text("")
    (tmp_path / "inbox.jsonl").write_text(damage)
    code, text = said(capsys, "records", str(tmp_path))
    assert (code, "inbox.jsonl:1 is no line of an inbox" in text) == (2, True), text
    (tmp_path / "service.json").write_text("{")
    code, text = said(capsys, "rollback", str(tmp_path))
    assert (code, "service.json cannot be read" in text) == (3, True), text
    (tmp_path / "service.json").write_text(json.dumps({"url": "http://127.0.0.1:1"}))
    code, text = said(capsys, "rollback", str(tmp_path))
    assert (code, "does not answer" in text) == (3, True), text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--name", "a", "--remove", "b"), "give one of them"),
        (("--name", "a", "--scopes", "root"), "root is no scope"),
        (("--remove", "b"), "there is no token of b"),
    ],
)
def test_tokens(words: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said(capsys, "tokens", str(tmp_path / "tokens.json"), *words)
    assert (code, expected in text) == (2, True), text
    code, text = said(capsys, "tokens", str(tmp_path / "none" / "tokens.json"), "--name", "a")
    assert (code, "the file cannot be written" in text) == (2, True), text
