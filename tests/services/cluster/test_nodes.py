"""The nodes that a run is given, and its requests to Ray's autoscaler, read where the autoscaler reads them."""

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get

from sdft.actors.shared.process import scratch_folder
from sdft.services.base.errors import PreflightError
from sdft.services.cluster.cluster import placement
from sdft.services.cluster.nodes import NodeRequest, requested
from sdft.services.config.sections import RayConfig
from sdft.services.planning.parts import Part
from sdft.services.planning.plan import Plan
from tests.runs.run import wait_until

STUDENT, TEACHER = Part("student engine 0", 0.5, 0, 1.0), Part("teacher engine 0", 1, 1, 1.0)
RANKS = (Part("learner rank 0", 0.5, 0, 1.0), Part("learner rank 1", 0.5, 0, 1.0))
PLAN = Plan({"student": (STUDENT,), "teacher": (TEACHER,)}, RANKS)


def told() -> list[dict[str, float]]:
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")


def until_told(*bundles: dict[str, float]) -> None:
    wait_until(lambda: sorted(told(), key=str) == sorted(bundles, key=str), f"the autoscaler was told {bundles}")


@pytest.mark.usefixtures("ray_cluster")
def test_requests_of_runs_add_up_and_are_withdrawn_or_expire() -> None:
    half, whole = {"CPU": 0.5}, {"CPU": 1.0, "GPU": 1.0}
    with requested("run one", PLAN, wait_s=60) as one:
        until_told(half, half, half, whole)
        one.renew({"student": 3, "teacher": 1})
        until_told(half, half, half, half, half, whole)
        killed = NodeRequest("run two, whose driver is killed", PLAN)
        killed.renew({"student": 0, "teacher": 1}, lasts_s=2)
        until_told(half, half, half, half, half, whole, half, half, whole)
        until_told(half, half, half, half, half, whole)
    assert told() == []
    ray.kill(killed._coordinator.actor)


@pytest.mark.usefixtures("ray_cluster")
def test_a_part_with_labels_is_placed_on_a_node_that_has_them_or_nowhere() -> None:
    async def place(config: RayConfig, **labels: str) -> None:
        async with placement(config, Plan({"student": (replace(STUDENT, labels=labels),)}, ())) as options:
            assert len(options["student"]) == 1

    (node,) = ray.nodes()
    asyncio.run(place(RayConfig(), **node["Labels"]))
    with pytest.raises(PreflightError, match="no node labelled sdft=actors has room for student engine 0"):
        asyncio.run(place(RayConfig(wait_s=9), sdft="actors"))
    with pytest.raises(PreflightError, match="the autoscaler added no node"):
        asyncio.run(place(RayConfig(autoscaling=True, wait_s=1), sdft="actors"))


def test_the_next_process_removes_the_folders_of_killed_ones(tmp_path: Path) -> None:
    code = (
        "import os, signal; from sdft.actors.shared.process import scratch_folder\n"
        "with scratch_folder('kind-', os.environ['HERE']): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"HERE": str(tmp_path)}, check=False, timeout=60)
    (left,) = tmp_path.iterdir()
    with scratch_folder("kind-", str(tmp_path)) as first, scratch_folder("kind-", str(tmp_path)) as second:
        assert set(tmp_path.iterdir()) == {first, second}
        assert left not in (first, second)
    assert list(tmp_path.iterdir()) == []
