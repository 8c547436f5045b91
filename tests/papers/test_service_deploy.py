"""Manifests, alerts and dashboard of a service: the command, the configuration, the probes and the figures exist."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.services.cli.app import parse
from sdft.services.config.load import load_config
from sdft.services.config.run import RunConfig
from sdft.services.serving.http.reference import schema
from tests.fakes.small_service import checked_service, running
from tests.papers.documents import ROOT

MANIFESTS = {"one node": "kubernetes/service.yaml", "cluster": "kuberay/raycluster-service.yaml"}
MONITORING = ROOT / "deploy" / "monitoring"
CLAIMED = {"one node": "/data", "cluster": "/shared"}  # where the volume that stays is


def parts(name: str) -> dict[str, Any]:
    text = (ROOT / "deploy" / MANIFESTS[name]).read_text()
    return {part["kind"]: part for part in yaml.safe_load_all(text)}


def groups() -> dict[str, dict[str, Any]]:
    return {g["groupName"]: g for g in parts("cluster")["RayCluster"]["spec"]["workerGroupSpecs"]}


def pod_of(name: str) -> dict[str, Any]:
    """Return the spec of the pod that has the gateway."""
    owner = parts(name)["Deployment"]["spec"] if name == "one node" else groups()["gateway"]
    return dict(owner["template"]["spec"])


def gateway_of(name: str) -> dict[str, Any]:
    (found,) = [c for c in pod_of(name)["containers"] if c["name"] == "service"]
    return dict(found)


def config_of(name: str, folder: Path) -> RunConfig:
    path = folder / "service.yaml"
    path.write_text(parts(name)["ConfigMap"]["data"][path.name].replace("/opt/sdft", str(ROOT)))
    return load_config(path)


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_command_and_its_configuration_are_valid(name: str, tmp_path: Path) -> None:
    pod, container, config = pod_of(name), gateway_of(name), config_of(name, tmp_path)
    assert container["command"][:3] == ["sdft", "serve", "/etc/sdft/service.yaml"]
    assert not isinstance(parse(container["command"][1:]), int)
    assert config.service is not None
    for s in config.sets:
        assert Path(s.file).is_file()
    (port,) = container["ports"]
    assert port["containerPort"] == config.service.http.port
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes.keys() == set(mounts.values())
    tokens, text = Path(str(config.service.http.tokens)), (ROOT / "deploy" / MANIFESTS[name]).read_text()
    assert volumes[mounts[str(tokens.parent)]]["secret"]["secretName"] in text.partition("apiVersion")[0]
    assert volumes["config"]["configMap"]["name"] == parts(name)["ConfigMap"]["metadata"]["name"]
    assert "persistentVolumeClaim" in volumes[mounts[CLAIMED[name]]]
    assert container["command"][4].startswith(f"{CLAIMED[name]}/")


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_gateway_is_reached_and_confined(name: str, tmp_path: Path) -> None:
    config, container, every = config_of(name, tmp_path), gateway_of(name), parts(name)
    assert config.service is not None
    assert pod_of(name)["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["limits"] == container["resources"]["requests"]
    paths = schema()["paths"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    (port,) = every["Service"]["spec"]["ports"]
    assert port["targetPort"] == container["ports"][0]["name"]
    opened = every["NetworkPolicy"]["spec"]["ingress"][-1]
    assert opened["ports"] == [{"port": config.service.http.port}]
    assert opened["from"][0]["podSelector"]["matchLabels"] == {"sdft-client": "true"}


def test_on_one_node_there_is_one_gateway() -> None:
    every = parts("one node")
    deployment = every["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")
    assert every["Service"]["spec"]["selector"] == labels == deployment["selector"]["matchLabels"]
    assert every["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels


def test_in_a_cluster_each_part_has_its_nodes(tmp_path: Path) -> None:
    """One gateway, engines on nodes that stay, those of windows on nodes that come and may be taken away."""
    every, config = parts("cluster"), config_of("cluster", tmp_path)
    name, found = every["RayCluster"]["metadata"]["name"], groups()
    assert [found["gateway"][key] for key in ("replicas", "minReplicas", "maxReplicas")] == [1, 1, 1]
    assert every["Service"]["spec"]["selector"] == {"ray.io/cluster": name, "ray.io/group": "gateway"}
    assert every["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": name}
    environment = {e["name"]: e for e in gateway_of("cluster")["env"]}
    assert environment["RAY_ADDRESS"]["value"] == f"{name}-head-svc:6379"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == name
    ray, gateway = pod_of("cluster")["containers"]
    for path in ("/tmp/ray", "/dev/shm"):  # what a driver shares with its node's Ray
        shared = [m["name"] for c in (ray, gateway) for m in c["volumeMounts"] if m["mountPath"] == path]
        assert len(shared) == 2
        assert len(set(shared)) == 1
    assert config.service is not None
    serving = config.service.serving
    assert serving.cluster is not None
    assert (found["serving"]["minReplicas"], found["serving"]["maxReplicas"]) == (
        serving.replicas,
        serving.max_replicas,
    )
    assert [found[g]["minReplicas"] for g in ("learner", "actors")] == [0, 0]
    assert config.ray.autoscaling
    placed = [
        ("serving", serving.cluster.labels, serving.cluster.cpus),
        ("learner", config.learner.labels, config.learner.cpus),
        *(("actors", pool.labels, pool.cpus) for pool in config.actors.pools.values()),
    ]
    for group, labels, cpus in placed:
        assert labels == found[group]["labels"]
        (container,) = found[group]["template"]["spec"]["containers"]
        assert cpus <= float(container["resources"]["limits"]["cpu"])
    preemptible = [g for g in found if "nodeSelector" in found[g]["template"]["spec"]]
    assert preemptible == ["actors"]


@pytest.fixture(scope="module")
def shown(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What /metrics of a service shows."""
    service = checked_service(tmp_path_factory.mktemp("service"), tiny_model)

    async def run() -> str:
        async with running(service) as client:
            return (await client.get("/metrics")).text

    return asyncio.run(run())


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "service-alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return list(json.loads((MONITORING / "service-dashboard.json").read_text())["panels"])


def test_every_figure_of_an_alert_or_a_panel_exists(shown: str) -> None:
    names = set(re.findall(r"^(sdft_service_\w+)", shown, re.MULTILINE))
    expressions = [rule["expr"] for rule in rules()] + [t["expr"] for p in panels() for t in p["targets"]]
    for expression in expressions:
        used = set(re.findall(r"sdft_service_\w+", expression))
        assert used, expression
        assert used <= names, expression
        for label in re.findall(r"(?:state|status)=\"\w+\"", expression):
            assert f"{{{label}}}" in shown, expression


def test_every_alert_is_described() -> None:
    described = re.findall(r"^\| `(Sdft\w+)`", (ROOT / "docs" / "service.md").read_text(), re.MULTILINE)
    assert described == [rule["alert"] for rule in rules()]


def test_the_panels_lie_beside_each_other() -> None:
    seen: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & seen, panel["title"]
        assert at["x"] + at["w"] <= 24
        seen |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())
