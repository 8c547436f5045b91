"""Ray's processes of a run end with its driver, in whatever state they are."""

import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

LIMIT_S = 60  # for Ray's first process to start
END_S = 20  # for its processes to end
DRIVER = """
import sys, time
from pathlib import Path
from sdft.services.cluster.cluster import _ensure_token, _head
from sdft.services.planning.plan import Plan

_ensure_token()
with _head(Path(sys.argv[1]), Plan({}, ())):
    time.sleep(600)
"""


def below(process: psutil.Process) -> list[psutil.Process]:
    """Return the processes below one that are no zombies."""
    with suppress(psutil.NoSuchProcess):
        return [child for child in process.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    return []


def test_ray_ends_with_a_driver_that_is_killed_while_ray_starts() -> None:
    """The next run removes the folder of a driver that was killed. Ray then never finishes its start."""
    folder = Path("/tmp") / f"sdft-test-{time.monotonic_ns()}"  # paths of Ray's sockets are limited in length
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], stderr=subprocess.DEVNULL) as driver:
        until = time.monotonic() + LIMIT_S
        while len(ray := below(psutil.Process(driver.pid))) < 2:  # the process that starts Ray, and Ray's first
            assert time.monotonic() < until
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    _, left = psutil.wait_procs(ray, timeout=END_S)
    found = [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    for process in found:
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    assert found == []
