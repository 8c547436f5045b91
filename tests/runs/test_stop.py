"""A run that a scheduler stops by a signal to every process of its group or cgroup; an engine that fails to start."""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.runs.chaos.processes import all_of_run
from tests.runs.leftovers import new_since, on_machine
from tests.runs.run import STOPPED, command, wait_for_step, wait_until, write_run


@pytest.mark.parametrize(
    ("begun", "scope"), [("starting", "group"), pytest.param("training", "cgroup", marks=pytest.mark.whole)]
)
def test_a_signal_for_all_processes_stops_a_run_as_one_for_the_driver(
    begun: str, scope: str, tiny_model: Path, tmp_path: Path
) -> None:
    """test_run stops the group of a run that trains."""
    before, run_dir, out = on_machine(), tmp_path / "run", tmp_path / "out.txt"
    words = command(write_run(tmp_path, tiny_model, "float32", steps=500), run_dir, "teacher={weights: live}")
    with out.open("w") as file:
        driver = subprocess.Popen(words, stdout=file, stderr=subprocess.PIPE, text=True, start_new_session=True)
    if begun == "training":
        wait_for_step(1, run_dir, driver)
    else:
        wait_until(lambda: "starting engines" in out.read_text(), "its engines were started", driver)
    began = time.monotonic()
    if scope == "group":
        os.killpg(driver.pid, signal.SIGTERM)
    else:
        for pid in all_of_run(driver.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    _, errors = driver.communicate(timeout=100)
    assert time.monotonic() - began < 30
    assert driver.returncode == 130
    assert json.loads((run_dir / "run.json").read_text())["error"] == "stopped by a signal"
    if scope == "cgroup" and "Ray's processes did not answer" in errors:
        # The next run removes its temporary folder.
        left = new_since(before, lambda: {found for found in on_machine() if not found.startswith("file ")})
    else:
        assert errors == STOPPED
        left = new_since(before)
    assert left == set()


def test_an_engine_that_cannot_start_ends_the_run_in_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    """vLLM refuses its settings with an exception that cannot be sent to the driver."""
    config, run_dir = write_run(tmp_path, tiny_model, "float32"), tmp_path / "run"
    broken = command(config, run_dir, "actors.student.max_num_seqs=100000000", "teacher={weights: live}")
    result = subprocess.run(broken, capture_output=True, text=True, timeout=300, check=False)
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("sdft: an engine could not start: ")
    assert "root cause" not in sentence
    assert sentence.endswith(f"; logs: {run_dir / 'logs'}")
    assert result.returncode == 1
    assert list(run_dir.glob("logs/ray-*/worker-*"))
