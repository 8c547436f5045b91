"""The message for a failed process: its root cause, which may stand only in another process's log."""

import os
import threading
import time
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError

from sdft.actors.shared.types import WeightMismatch
from sdft.learner.group import LearnerLost
from sdft.services.cli.root_cause import explained, last_error

LOG = """\
(EngineCore pid=77) INFO 11-28 02:00:00 [core.py:1] Initializing an engine
(EngineCore pid=77) ERROR 11-28 02:00:01 [core.py:2] Traceback (most recent call last):
(EngineCore pid=77) ERROR 11-28 02:00:01 [core.py:2] KeyError: 'layers.0.e_score_correction_bias'
RuntimeError: Engine core initialization failed. See root cause above.
ray.exceptions.RayTaskError(RuntimeError): ray::EngineWorker.start() (pid=70)
"""


def failed_call(method: str, cause: Exception, worker: str = "EngineWorker") -> RayTaskError:
    """Return the error that Ray raises in the driver."""
    text = (
        f"\x1b[36mray::{worker}.{method}()\x1b[39m (pid=70, ip=10.0.0.1)\nTraceback:\n{type(cause).__name__}: {cause}"
    )
    error = RayTaskError(f"{worker}.{method}", text, cause, pid=70).as_instanceof_cause()
    assert isinstance(error, RayTaskError)
    return error


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with the logs of two starts: one process of the first, two of the last."""
    for start, pid, text in (
        ("1", 70, "ValueError: of another start"),
        ("2", 70, LOG),
        ("2", 71, "OSError: another's"),
    ):
        folder = tmp_path / "logs" / f"ray-20261128-00000{start}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"worker-ab-01000000-{pid}.out"
        path.write_text(text)
        os.utime(path, (time.time() + pid, time.time() + pid))
    return tmp_path


def test_an_engine_that_cannot_start_is_explained_by_the_last_error_of_its_own_log(run_dir: Path) -> None:
    opaque = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    failure = explained(failed_call("start", opaque), run_dir)
    assert str(failure) == (
        f"an engine could not start: KeyError: 'layers.0.e_score_correction_bias'; logs: {run_dir / 'logs'}"
    )
    assert last_error(run_dir / "logs", None) == "OSError: another's"
    assert last_error(run_dir / "nothing", 70) is None


def test_the_end_by_the_memory_monitor_of_ray_is_one_sentence(run_dir: Path) -> None:
    said = "3 worker(s) were killed due to the node running low on memory.\nOOM kill reason: ...\nObject store: ..."
    assert str(explained(OutOfMemoryError(said), run_dir)) == (
        "a process of the run was lost: 3 worker(s) were killed due to the node running low on memory.; logs: "
        f"{run_dir / 'logs'}"
    )


def test_a_cause_that_came_with_the_exception_is_kept(run_dir: Path) -> None:
    failure = explained(failed_call("start", ValueError("no room for the cache\nmore")), run_dir)
    assert str(failure) == f"an engine could not start: no room for the cache; logs: {run_dir / 'logs'}"
    learner = explained(failed_call("train_step", ValueError("a bad batch"), "LearnerWorker"), None)
    assert str(learner) == "a learner process failed in train_step: a bad batch"


def test_a_cause_that_cannot_be_sent_is_read_from_the_traceback_that_came_instead(run_dir: Path) -> None:
    failure = explained(failed_call("start", ValueError("no room", threading.Lock())), run_dir)
    assert str(failure).startswith("an engine could not start: ValueError: ('no room', <unlocked")


@pytest.mark.parametrize("wrapped", [False, True])
def test_refused_weights_are_a_sentence(wrapped: bool, tmp_path: Path) -> None:
    cause = WeightMismatch("student weights v0: a gap of 0.13, more than 0.08: choose another model")
    failure = explained(failed_call("update_weights", cause) if wrapped else cause, tmp_path)
    assert str(failure) == f"an engine refused its weights: {cause}; logs: {tmp_path / 'logs'}"


def test_other_failures_are_explained_and_bugs_are_not() -> None:
    assert str(explained(LearnerLost("a learner process died while it started"), None)) == (
        "a learner process died while it started"
    )
    assert str(explained(TimeoutError("waited 600 s for student engine 0 to load its model"), None)).startswith(
        "waited"
    )
    assert explained(KeyError("a mistake"), None) is None
