"""Whole runs have the machine for themselves."""

import pytest
import ray


@pytest.fixture(scope="module", autouse=True)
def no_other_cluster() -> None:
    """End the cluster of `ray_cluster`: its idle processes take 5 % of a core."""
    ray.shutdown()
