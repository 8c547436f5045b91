"""What the services use of Ray that is not documented. Known for the version below.

Each function names what it uses. tests/services/cluster/test_compat.py has one line for each name and fails without it.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

RAY = "2.60.0"
TEMPORARY = "_temp_dir"  # ray.init's name for the folder of a new cluster's files
JOB_FOLDER = "_ray_pkg_"  # what the name of the folder begins with in which a job runs: packaging.RAY_PKG_PREFIX


def draining_nodes() -> set[str]:
    """Ids of the nodes that take no new work and will end: a preemption notice, or an autoscaler's drain.

    Uses ray._private.state.state.get_draining_nodes, as Ray's own libraries (Train, Serve) do. Ray has no documented
    call.
    """
    return set(ray._private.state.state.get_draining_nodes())


def read_authentication() -> None:
    """Make Ray read the mode of authentication from the environment, which it otherwise does only at import.

    Uses ray._raylet.Config.initialize.
    """
    ray._raylet.Config.initialize("")


class Coordinator:
    """The actor that adds up the requests of all requesters to Ray's autoscaler, and drops those that are not renewed.

    Uses ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator, as Ray's own libraries (Data, Train) do.
    The documented ray.autoscaler.sdk.request_resources keeps one request for the whole cluster, without expiry.
    """

    def __init__(self) -> None:
        # Imported here: it takes a second, and runs without autoscaling do not need it.
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator

        self.actor: Any = default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()

    def request(
        self,
        requester: str,
        bundles: Sequence[Mapping[str, float]],
        labels: Sequence[Mapping[str, str]],
        lasts_s: float,
    ) -> None:
        """Request resources for lasts_s, in place of the requester's earlier request. Returns at once.

        labels: those that a node must have, for each bundle.
        """
        self.actor.request_resources.remote(
            requester_id=requester, resources=bundles, label_selectors=labels, expire_after_s=lasts_s
        )

    def cancel(self, requester: str, timeout_s: float) -> None:
        """Cancel the requester's request. Raises RayError if the actor does not answer."""
        ray.get(self.actor.cancel_request.remote(requester), timeout=timeout_s)


def each_sent(folder: Path, excludes: Sequence[str], handle: Callable[[Path], None]) -> None:
    """Call `handle` for each file and folder that Ray sends of a job's working directory.

    Uses _get_excludes and _dir_travel of ray._private.runtime_env.packaging: Ray's own walk skips files named by
    .gitignore and .rayignore in every folder, and follows links.
    """
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env import packaging

    excluded = [packaging._get_excludes(folder, list(excludes))]
    gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    packaging._dir_travel(folder, excluded, handle, include_gitignore=gitignore, logger=logging.getLogger(__name__))
