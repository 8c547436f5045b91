"""What a command may leave on the machine: processes, shared memory, Ray sessions, temporary folders."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NAMES = ("raylet", "gcs_server", "ray::", "VLLM::", "dashboard", "sdft.services.cli", "bin/sdft")
TEMPORARY = ("sdft-*", "vllm_dist_*", "ray/session_*", "????????-????-????-????-????????????")


def on_machine() -> set[str]:
    """Return everything of these kinds that exists now, each as one line of text."""
    found = {f"shared memory {p.name}" for p in Path("/dev/shm").iterdir()}
    for pattern in TEMPORARY:
        found |= {f"file {p}" for p in Path(tempfile.gettempdir()).glob(pattern)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # A zombie has an empty command line and holds no resources.
        if any(name in command for name in NAMES):
            # Ray renames an actor's process to the method that it runs.
            name = command.split(".")[0] if command.startswith("ray::") else command[:90]
            found.add(f"process {process.name} {name.strip()}")
    return found


def children() -> set[str]:
    """Return the processes below this one, for tests that run beside other tests."""
    return {f"process {child.pid}" for child in psutil.Process().children(recursive=True)}


def new_since(before: set[str], found: Callable[[], set[str]] = on_machine) -> set[str]:
    """Return what is found now and is not in `before`. Waits up to 60 s for it to disappear."""
    deadline = time.monotonic() + 60
    while (left := found() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
