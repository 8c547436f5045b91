"""The manifest and the alerts of a service: the command, the configuration, the probes and the figures exist."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.services.cli.app import parse
from sdft.services.config.load import load_config
from sdft.services.serving.http.reference import schema
from tests.fakes.small_service import checked_service, running
from tests.papers.documents import ROOT

MANIFEST = ROOT / "deploy" / "kubernetes" / "service.yaml"
ALERTS = ROOT / "deploy" / "monitoring" / "service-alerts.yaml"


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return {part["kind"]: part for part in yaml.safe_load_all(MANIFEST.read_text())}


def test_the_command_and_its_configuration_are_valid(parts: dict[str, Any], tmp_path: Path) -> None:
    pod = parts["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:2] == ["sdft", "serve"]
    assert not isinstance(parse(container["command"][1:]), int)
    path = tmp_path / Path(container["command"][2]).name
    path.write_text(parts["ConfigMap"]["data"][path.name].replace("/opt/sdft", str(ROOT)))
    config = load_config(path)
    assert config.service is not None
    for s in config.sets:
        assert Path(s.file).is_file()
    (port,) = container["ports"]
    assert port["containerPort"] == config.service.http.port
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes.keys() == set(mounts.values())
    tokens = Path(str(config.service.http.tokens))
    assert (
        volumes[mounts[str(tokens.parent)]]["secret"]["secretName"] in MANIFEST.read_text().partition("apiVersion")[0]
    )
    assert volumes["config"]["configMap"]["name"] == parts["ConfigMap"]["metadata"]["name"]
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == parts["PersistentVolumeClaim"]["metadata"]["name"]
    assert container["command"][4].startswith("/data/")


def test_the_pod_is_reached_and_confined(parts: dict[str, Any]) -> None:
    deployment = parts["Deployment"]["spec"]
    pod, labels = deployment["template"]["spec"], deployment["template"]["metadata"]["labels"]
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")
    assert parts["Service"]["spec"]["selector"] == labels == deployment["selector"]["matchLabels"]
    assert parts["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert pod["securityContext"]["runAsNonRoot"]
    (container,) = pod["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["limits"] == container["resources"]["requests"]
    paths = schema()["paths"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in paths


def test_every_figure_of_an_alert_exists(tiny_model: Path, tmp_path: Path) -> None:
    service = checked_service(tmp_path, tiny_model)

    async def run() -> str:
        async with running(service) as client:
            return (await client.get("/metrics")).text

    shown = asyncio.run(run())
    names = set(re.findall(r"^# TYPE (\S+)", shown, re.MULTILINE))
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    for rule in group["rules"]:
        used = set(re.findall(r"sdft_service_\w+", rule["expr"]))
        assert used, rule
        assert used <= names, rule
        for label in re.findall(r"\{(\w+=\"\w+\")\}", rule["expr"]):
            assert f"{{{label}}}" in shown, rule
    described = re.findall(r"^\| `(Sdft\w+)`", (ROOT / "docs" / "service.md").read_text(), re.MULTILINE)
    assert described == [rule["alert"] for rule in group["rules"]]
