"""The configuration of a service: what it fills in, and what it refuses."""

from pathlib import Path

import pytest

from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config

LEAST = "model: any\ntraining: {batch_size: 2}\n"


def load(tmp_path: Path, text: str) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    try:
        load_config(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "data: {train: a.jsonl}\nservice: {}",
            "data.train and data.source are of a run, and a service trains what it",
        ),
        ("data: {source: log}\nservice: {}", "data.train and data.source are of a run"),
        ("stages: [{name: a}]\nservice: {}", "stages are of a run"),
        ("service: {http: {host: 0.0.0.0}}", "service.http: host 0.0.0.0 is reachable from other machines"),
        ("service: {http: {tls_key: k.pem}}", "service.http: tls_certificate and tls_key go together"),
        ("service: {http: {proxies: {}}}", "service.http: proxies on other nodes cannot reach host 127.0.0.1; set"),
        (
            "service: {http: {host: 10.0.0.1, tokens: t, proxies: {}}}",
            "service: http.proxies are of a Ray cluster; set serving.cluster too",
        ),
        (
            "service: {http: {host: 10.0.0.1, tokens: t, tls_key: k, tls_certificate: c, proxies: {}}}",
            "service.http: the proxies speak plain HTTP to the gateway; remove tls_key",
        ),
        ("service: {gate: {promote_below: 0.6}}", "service.gate: promote_below 0.6 must not exceed refuse_above 0.5"),
        ("service: {window: {grader: judge}}", "service.window: grader judge cannot grade held-out records"),
        ("service: {windows: {}}", "service.windows is not a setting; did you mean service.window?"),
        ("service: {http: {port: 70000}}", "service.http.port"),
        ("service: {name: a b}", "service.name"),
        ("service: 3", "service"),
    ],
)
def test_refused(tmp_path: Path, text: str, said: str) -> None:
    assert load(tmp_path, LEAST + text).startswith(said)


def test_steps_are_of_a_run(tmp_path: Path) -> None:
    said = load(tmp_path, "model: any\ntraining: {steps: 3}\nservice: {}")
    assert said == "training.epochs and steps are of a run; set service.window.epochs instead"


def test_what_is_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(LEAST + "service: {window: {epochs: 7}}")
    config = load_config(path)
    assert (config.training.epochs, config.teacher.weights) == (7, "base")
    assert config.data is not None
    assert config.data.train == "inbox"
    path.write_text(LEAST + "teacher: {weights: ema}\nservice: {}")
    assert load_config(path).teacher.weights == "ema"
