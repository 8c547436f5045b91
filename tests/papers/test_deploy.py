"""deploy/: images and jobs use what this version contains, and the overview names every file."""

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args
from ray.runtime_env import RuntimeEnv

from sdft.services.cli.app import parse
from sdft.services.cluster.submit import EXCLUDES
from tests.papers.documents import ROOT
from tests.papers.test_kuberay import CLUSTERS, DEPLOY, IMAGE_SOURCE, pods


def test_a_jobs_runtime_environment_leaves_out_what_sdft_submit_leaves_out(tmp_path: Path) -> None:
    read = parse_runtime_env_args(str(DEPLOY / "ray-job" / "runtime-env.yaml"), working_dir=str(tmp_path))
    assert read == {"working_dir": str(tmp_path), "excludes": list(EXCLUDES)}
    assert RuntimeEnv(**read)["excludes"] == list(EXCLUDES)
    comment = (DEPLOY / "ray-job" / "runtime-env.yaml").read_text()
    entrypoint = re.search(r"-- \\\n# +(sdft .*)", comment)
    assert entrypoint is not None
    command = parse(shlex.split(entrypoint[1])[1:])
    assert not isinstance(command, int)
    assert command.keywords["run_dir"] == "/shared/runs/my"


def instructions(dockerfile: Path) -> list[list[str]]:
    """Return the lines of a Dockerfile as words, with continued lines joined."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_an_image_is_built_from_files_that_exist_and_the_context_has(kind: str) -> None:
    """The image is not built, since that needs Docker and the network."""
    path = DEPLOY / "docker" / f"Dockerfile.{kind}"
    words = instructions(path)
    (base,) = [w[1] for w in words if w[0] == "FROM"]
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"]
    assert re.fullmatch(rf"python:{re.escape(wanted)}\.\d+-slim-\w+", base)
    ignored = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    for source in [source for w in words if w[0] == "COPY" for source in w[1:-1]]:
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in ignored
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert not any(fnmatch(name, pattern) for name in EXCLUDES for pattern in kept)
    assert [w[1] for w in words if w[0] == "USER"] == ["1000:1000"]
    assert {pod["securityContext"]["runAsUser"] for name in CLUSTERS for pod in pods(name)} == {1000}
    assert next(w[1] for w in words if w[0] == "WORKDIR") == IMAGE_SOURCE


def test_the_cpu_image_installs_the_pins_of_the_makefile() -> None:
    makefile = [shlex.split(line) for line in (ROOT / "Makefile").read_text().splitlines()]
    files = {w for words in makefile if "requirements/install.sh" in words for w in words if w.endswith(".txt")}
    pins, project = [w for w in instructions(DEPLOY / "docker" / "Dockerfile.cpu") if "pip" in w]
    named = {word for word in pins if word.endswith(".txt")}
    elsewhere = {"dev.txt", "docs.txt", "triton.txt", "verifiers.txt"}  # of tests and documents
    assert named == files - {f"requirements/{name}" for name in elsewhere} - {"benchmarks/trl/requirements.txt"}
    assert "--no-deps" in pins
    assert {"--no-deps", "--no-build-isolation", "."} <= set(project)


def test_the_gpu_image_installs_the_extra_of_that_name() -> None:
    (line,) = [w for w in instructions(DEPLOY / "docker" / "Dockerfile.gpu") if "pip" in w]
    assert line[-1] == ".[gpu]"
    assert "gpu" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_overview_names_every_file() -> None:
    overview = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert f"`{path.relative_to(DEPLOY)}`" in overview, path
