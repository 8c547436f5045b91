"""The undocumented names in services/cluster/compat.py: each is in the installed Ray. Starts no cluster."""

from pathlib import Path

import pytest

from sdft.services.cluster import compat
from tests.canary import Canary, Library, mentions, named, takes

RAY = Library("Ray", compat.RAY, "services/cluster/compat.py", ("ray",))
COORDINATOR = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
ACTOR = f"{COORDINATOR}:_AutoscalingCoordinatorActor"
PACKAGING = "ray._private.runtime_env.packaging"

CANARIES: dict[str, Canary] = {
    "ray._private.state.state.get_draining_nodes": lambda: callable(
        named("ray._private.state:state").get_draining_nodes
    ),
    "GlobalState.get_draining_nodes": lambda: named("ray._private.state:GlobalState.get_draining_nodes"),
    "ray._raylet.Config.initialize": lambda: named("ray._raylet:Config.initialize"),
    "get_or_create_autoscaling_coordinator of the actor _AutoscalingCoordinatorActor": lambda: mentions(
        f"{COORDINATOR}:get_or_create_autoscaling_coordinator", "_AutoscalingCoordinatorActor"
    ),
    "request_resources(requester_id, resources, label_selectors, expire_after_s)": lambda: takes(
        f"{ACTOR}.request_resources", "requester_id", "resources", "label_selectors", "expire_after_s"
    ),
    "cancel_request(requester_id)": lambda: takes(f"{ACTOR}.cancel_request", "requester_id"),
    "ray.init(_temp_dir=)": lambda: mentions("ray:init", compat.TEMPORARY),
    "packaging._get_excludes(path, excludes)": lambda: takes(f"{PACKAGING}:_get_excludes", "path", "excludes"),
    "packaging._dir_travel(path, excludes, handler, include_gitignore, logger)": lambda: takes(
        f"{PACKAGING}:_dir_travel", "path", "excludes", "handler", "include_gitignore", "logger"
    ),
    "ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE": lambda: named(
        "ray._private.ray_constants:RAY_RUNTIME_ENV_IGNORE_GITIGNORE"
    ),
    "the prefix _ray_pkg_ of a job's folder": lambda: named(f"{PACKAGING}:RAY_PKG_PREFIX") == compat.JOB_FOLDER,
}


def test_the_installed_version_is_the_known_one() -> None:
    RAY.check_version()


@pytest.mark.parametrize("name", CANARIES)
def test_ray_has_the_name(name: str) -> None:
    RAY.check(name, CANARIES[name])


def test_what_is_excluded_or_ignored_is_not_sent(tmp_path: Path) -> None:
    for name in ("kept.txt", "out/left.txt", "ignored.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("ignored.txt\n")
    sent: list[str] = []
    compat.each_sent(tmp_path, ["out"], lambda path: sent.append(path.name))
    assert sorted(sent[1:]) == [".gitignore", "kept.txt"]  # the first is the folder itself
