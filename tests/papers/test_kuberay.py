"""deploy/kuberay: Kubernetes accepts the manifests, and this version of the code accepts the commands in them."""

import copy
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

from sdft.services.cli.app import parse
from sdft.services.cli.commands.train import train
from sdft.services.config.load import load_config
from sdft.services.config.run import RunConfig
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import Prepared
from tests.papers.documents import ROOT

DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
JOBS = ("rayjob-train.yaml", "raycronjob-continual.yaml")
CLUSTERS = (*JOBS, "raycluster-autoscaling.yaml", "raycluster-service.yaml")
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"  # KubeRay's own schemas; the tests are skipped without them
QUANTITIES = {"m": 1e-3, "": 1.0, "Mi": 2.0**20, "Gi": 2.0**30}
IMAGE_SOURCE = "/opt/sdft"  # folder of this repository in the image


def documents(name: str) -> dict[str, dict[str, Any]]:
    """Return the objects of a manifest by kind."""
    return {d["kind"]: d for d in yaml.safe_load_all((KUBERAY / name).read_text())}


def custom(name: str) -> dict[str, Any]:
    """Return the manifest's object that is KubeRay's."""
    (found,) = [d for d in documents(name).values() if d["apiVersion"] == "ray.io/v1"]
    return found


def job(name: str) -> dict[str, Any]:
    spec = custom(name)["spec"]
    return dict(spec.get("jobTemplate", spec))


def cluster(name: str) -> dict[str, Any]:
    spec = custom(name)["spec"]
    return dict(spec.get("jobTemplate", spec).get("rayClusterSpec", spec))


def groups(name: str) -> list[dict[str, Any]]:
    """Return the node groups, the head first."""
    return [cluster(name)["headGroupSpec"], *cluster(name)["workerGroupSpecs"]]


def pods(name: str) -> list[dict[str, Any]]:
    """Return the specs of all pods, including that of a job's submitter."""
    submitter = [] if name not in JOBS else [job(name)["submitterPodTemplate"]["spec"]]
    return [group["template"]["spec"] for group in groups(name)] + submitter


def amount(quantity: str) -> float:
    """Return a Kubernetes quantity in cores or bytes."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * QUANTITIES[unit]


def strict(schema: Any) -> Any:
    """Return a CRD's schema in which an unknown field is an error. Kubernetes itself drops such a field silently."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not open_ended:
        result["additionalProperties"] = False
    return result


def mistakes(document: dict[str, Any]) -> list[str]:
    path = SCHEMAS / f"ray.io_{document['kind'].lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not in {SCHEMAS}")
    (version,) = [v for v in yaml.safe_load(path.read_text())["spec"]["versions"] if v["name"] == "v1"]
    validator = jsonschema.Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("name", CLUSTERS)
def test_kuberays_schema_takes_a_manifest_with_every_field_of_it(name: str) -> None:
    assert mistakes(custom(name)) == []


@pytest.mark.parametrize("path", ["spec.backofLimit", "spec.rayClusterSpec.headGroupSpec.template.spec.nodeSelectr"])
def test_a_misspelt_field_is_found(path: str) -> None:
    document = copy.deepcopy(custom("rayjob-train.yaml"))
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[key]
    place[last] = {}
    (found,) = mistakes(document)
    assert last in found


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_container_has_what_a_cluster_asks_of_it(name: str) -> None:
    for pod in pods(name):
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"], "the pod would be the first to go"
            assert {"cpu", "memory"} <= set(resources["limits"])
            assert not container["securityContext"]["allowPrivilegeEscalation"]
        declared = {volume["name"] for volume in pod.get("volumes", ())}
        assert {mount["name"] for c in pod["containers"] for mount in c.get("volumeMounts", ())} == declared


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_nodes_of_a_cluster_share_storage_and_have_health_probes(name: str) -> None:
    claim = documents("storage.yaml")["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    monitor = yaml.safe_load((DEPLOY / "monitoring" / "podmonitor.yaml").read_text())
    for group in groups(name):
        pod = group["template"]["spec"]
        container = pod["containers"][0]  # Ray's
        volumes = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        by_name = {volume["name"]: volume for volume in pod["volumes"]}
        claimed = by_name[volumes["/shared"]]["persistentVolumeClaim"]["claimName"]
        assert claimed == claim["metadata"]["name"]
        memory = by_name[volumes["/dev/shm"]]["emptyDir"]
        assert memory["medium"] == "Memory"
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store <= amount(memory["sizeLimit"]) < amount(container["resources"]["limits"]["memory"])
        for probe in ("livenessProbe", "readinessProbe"):
            # A path without a token, because the kubelet has none.
            assert container[probe]["httpGet"] == {"path": PUBLIC_EXACT_PATHS[0], "port": 52365}
        ports = {port["name"] for port in container["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
        stops = " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
        assert "ray stop" in stops
        grace = sum(map(int, re.findall(r"\d+", stops)))
        assert grace < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_is_the_installed_version_and_asks_for_a_token(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert cluster(name)["rayVersion"] == ray.__version__
    assert cluster(name)["authOptions"] == {"mode": "token"}
    for pod in pods(name):
        for container in pod["containers"]:
            assert container["image"].endswith(f"/sdft:{project}-ray{ray.__version__}-cpu")
    assert groups(name)[0]["rayStartParams"]["num-cpus"] == "0"


def commands(name: str) -> Iterator[list[str]]:
    """Yield the `sdft` commands of a job, from its entrypoint or from the script that the entrypoint names."""
    words = shlex.split(job(name)["entrypoint"])
    if words[0] == "sdft":
        yield words
        return
    script = documents(name)["ConfigMap"]["data"][Path(words[1]).name]
    subprocess.run([words[0], "-n", "-c", script], check=True, timeout=60)  # checks the syntax, runs nothing
    for line in script.splitlines():
        if "sdft " in line and not line.strip().startswith("#"):
            yield shlex.split(line[line.index("sdft ") :])


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_entrypoint_is_a_command_of_this_version(name: str) -> None:
    """The program's own parser reads it."""
    parsed = [parse(words[1:]) for words in commands(name)]
    assert not any(isinstance(command, int) for command in parsed)
    (given,) = [c.keywords for c in parsed if not isinstance(c, int) and c.func is train]
    mounts = pods(name)[0]["containers"][0]["volumeMounts"]
    folder, file = str(given["config"]).rsplit("/", 1)
    assert folder in [mount["mountPath"] for mount in mounts]  # the driver runs on the head
    assert file in documents(name)["ConfigMap"]["data"]
    assert given["run_dir"].startswith(("/shared/", "$run"))
    assert given["resume"] == "auto"
    assert job(name)["backoffLimit"] > 0
    assert job(name)["shutdownAfterJobFinishes"]


def prepared(name: str, tmp_path: Path, overrides: list[str]) -> Prepared:
    """Return the prepared configuration of a job. Paths in the image are replaced by paths in the repository."""
    (text,) = [text for key, text in documents(name)["ConfigMap"]["data"].items() if key.endswith(".yaml")]
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(IMAGE_SOURCE, str(ROOT)))
    return prepare(load_config(path, overrides), path)


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_run_fits_into_its_worker(name: str, smollm2: Path, tmp_path: Path) -> None:
    """Into a single worker, which exists when the run begins."""
    nightly = [f"model={smollm2}", f"data.train={ROOT / 'examples' / 'tools' / 'train.jsonl'}"]
    run = prepared(name, tmp_path, [] if name == JOBS[0] else nightly)
    (worker,) = cluster(name)["workerGroupSpecs"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert worker["minReplicas"] == worker["replicas"] == 1
    assert run.plan.cpus == amount(limits["cpu"]), "Ray would refuse the run, or cores would lie idle"
    memory = worker["template"]["spec"]["volumes"][1]["emptyDir"]["sizeLimit"]
    assert run.plan.memory_gib * 2**30 + amount(memory) < amount(limits["memory"])
    c = run.config
    for threads in (c.learner.threads, c.actors.student.threads, c.actors.teacher.threads):
        assert threads == amount(limits["cpu"])
    assert c.monitoring.prometheus


def test_only_actors_go_to_preemptible_nodes() -> None:
    _, learner, actors = groups("raycluster-autoscaling.yaml")
    spot = actors["template"]["spec"]["nodeSelector"]
    (key,) = spot
    assert {t["key"] for t in actors["template"]["spec"]["tolerations"]} == {key}
    affinity = learner["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": key, "operator": "DoesNotExist"}]
    assert learner["minReplicas"] == 1, "a run's first processes find a node at once"
    assert (actors["minReplicas"], actors["maxReplicas"]) == (0, 8)


def test_the_configuration_for_the_autoscaling_cluster_names_its_groups_and_fits_their_nodes() -> None:
    """The configuration stands in the manifest's comment."""
    text = (KUBERAY / "raycluster-autoscaling.yaml").read_text()
    lines = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    settings = yaml.safe_load("\n".join(lines[lines.index("training: {max_staleness: 2}") :]))
    settings["training"]["steps"] = 1
    config = RunConfig.model_validate({"model": "m", "data": {"train": "t.jsonl"}} | settings)
    _, learner, actors = groups("raycluster-autoscaling.yaml")
    assert (config.learner.labels, config.actors.student.labels) == (learner["labels"], actors["labels"])
    for pool in config.actors.pools.values():
        container = actors["template"]["spec"]["containers"][0]
        assert pool.cpus <= amount(container["resources"]["limits"]["cpu"])
    assert config.ray.autoscaling
