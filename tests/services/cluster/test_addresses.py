"""Addresses of clusters: the accepted forms, including IPv6, and the errors that name the right form."""

from pathlib import Path

import pytest

from sdft.services.base.errors import UserError
from sdft.services.cli.main import main
from sdft.services.cluster.cluster import host_and_port
from sdft.services.config.sections import RayConfig
from tests.runs.run import write_run


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:6379", ("127.0.0.1", 6379)),
        ("head.example.com:6379", ("head.example.com", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("[fe80::1%eth0]:6379", ("fe80::1%eth0", 6379)),
        ("auto", None),
    ],
)
def test_where_a_cluster_answers(address: str, expected: tuple[str, int] | None) -> None:
    assert host_and_port(address) == expected


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("ray://head:10001", "is an address for Ray Client, which cannot drive a run"),
        ("http://head:8265", "is the address of a dashboard, which is only for jobs"),
        ("https://head", "is the address of a dashboard"),
        ("head", "names no port"),
        ("::1:6379", "is not HOST:PORT"),
        ("head:six", "is not HOST:PORT"),
        ("redis://head:6379", "has the unknown protocol redis"),
    ],
)
def test_an_address_that_cannot_work_is_refused_with_the_right_form(address: str, why: str) -> None:
    with pytest.raises(
        UserError, match=rf"ray\.address .*{why}.*; give the cluster's address as HOST:6379 or \[IPV6\]:6379"
    ):
        host_and_port(address)


def test_the_environment_may_say_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert RayConfig().running is None
    monkeypatch.setenv("RAY_ADDRESS", "[::1]:6379")
    assert RayConfig().running == "[::1]:6379"


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "ray://head:10001", "auto", "http://", "grpc://head:8265"])
def test_jobs_are_submitted_to_a_dashboard_only(
    address: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, tiny_model, "float32")
    monkeypatch.chdir(tmp_path)
    assert main(["submit", config.name, "--address", address, "--run-dir", "/shared/run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sdft: --address {address} ")
    assert "as http://HEAD:8265 or http://[IPV6]:8265" in said
