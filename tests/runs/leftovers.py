"""What a command could leave on the machine: processes, shared memory, Ray sessions, temporary folders."""

import tempfile
import time
from pathlib import Path

NAMES = ("raylet", "gcs_server", "ray::", "VLLM::", "dashboard", "sdft.services.cli", "bin/sdft")
TEMPORARY = ("sdft-*", "vllm_dist_*", "ray/session_*", "????????-????-????-????-????????????")


def on_machine() -> set[str]:
    """Everything of that kind that is there now, each as one line of text."""
    found = {f"shared memory {p.name}" for p in Path("/dev/shm").iterdir()}
    for pattern in TEMPORARY:
        found |= {f"file {p}" for p in Path(tempfile.gettempdir()).glob(pattern)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # A zombie has no command line any more, and holds nothing.
        if any(name in command for name in NAMES):
            # Ray renames an actor's process to the method that it runs.
            name = command.split(".")[0] if command.startswith("ray::") else command[:90]
            found.add(f"process {process.name} {name.strip()}")
    return found


def new_since(before: set[str], patience_s: float = 60) -> set[str]:
    """What is there now and was not before, after waiting for it to go."""
    deadline = time.monotonic() + patience_s
    while (left := on_machine() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
