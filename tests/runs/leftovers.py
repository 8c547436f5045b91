"""What a command may leave on the machine: processes, shared memory, Ray sessions, temporary folders.

Only what comes from this process is found, so that runs of other processes may go on beside it: `isolate` gives this
process a folder for temporary files and the orphans among its descendants.
"""

import ctypes
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

NAMES = (
    "raylet",
    "gcs_server",
    "ray::",
    "VLLM::",
    "dashboard",
    "sdft.services.cli",
    "sdft.services.serving",
    "bin/sdft",
)
TEMPORARY = ("sdft-*", "vllm_dist_*", "ray/session_*", "????????-????-????-????-????????????")
PR_SET_CHILD_SUBREAPER = 36  # of prctl(2): orphans below this process become its children
SHARED = Path("/dev/shm")


def isolate() -> Path:
    """Prepare this process for `on_machine`. Returns the folder for temporary files, whose path is short.

    The paths of Ray's sockets begin with it.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # the folders of tests stay where they are
    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    return Path(folder)


def end(folder: Path) -> None:
    """Remove the folder of `isolate`, and end what is still below this process."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def on_machine() -> set[str]:
    """Return everything of these kinds that exists now, each as one line of text."""
    others = _of_others()
    found = {f"shared memory {path.name}" for path in SHARED.iterdir() if path.name not in others}
    for pattern in TEMPORARY:
        found |= {f"file {p}" for p in Path(tempfile.gettempdir()).glob(pattern)}
    for process in psutil.Process().children(recursive=True):
        try:
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # A zombie has an empty command line and holds no resources.
        if any(name in command for name in NAMES):
            # Ray renames an actor's process to the method that it runs.
            name = command.split(".")[0] if command.startswith("ray::") else command[:90]
            found.add(f"process {process.pid} {name.strip()}")
    return found


def children() -> set[str]:
    """Return the processes below this one."""
    return {f"process {child.pid}" for child in psutil.Process().children(recursive=True)}


def new_since(before: set[str], found: Callable[[], set[str]] = on_machine) -> set[str]:
    """Return what is found now and is not in `before`. Waits up to 60 s for it to disappear."""
    deadline = time.monotonic() + 60
    while (left := found() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _of_others() -> set[str]:
    """Return the names of shared memory that processes which are not below this one have mapped."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    names = set()
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) not in own:
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                lines = (process / "maps").read_text().splitlines()
                names |= {line.partition(f"{SHARED}/")[2].split()[0] for line in lines if f" {SHARED}/" in line}
    return names
