"""The processes of a run, found as descendants of its driver, and their shared memory."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Kind of a process by the start of its command line. Ray names an actor's process after the method that it runs.
KINDS = {"ray::EngineWorker": "engine actor", "VLLM::EngineCore": "engine core", "ray::LearnerWorker": "learner rank"}


@dataclass(frozen=True)
class Process:
    """One process of a run."""

    pid: int
    kind: str

    def send(self, number: signal.Signals) -> bool:
        """Send a signal. Returns False if the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


def of_run(driver: int) -> list[Process]:
    """Return the live engines, their inner processes and learner ranks, including those that are starting."""
    return [Process(pid, kind) for pid in all_of_run(driver) if (kind := _kind(pid)) is not None]


def all_of_run(driver: int) -> list[int]:
    """Return the ids of the driver and of every process below it."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = []
    for pid in parents:
        above, ancestors = pid, set()
        while above in parents and above not in ancestors:
            ancestors.add(above)
            above = parents[above]
        if driver in ancestors:
            found.append(pid)
    return sorted(found)


def _kind(pid: int) -> str | None:
    with suppress(FileNotFoundError, ProcessLookupError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        return next((kind for begin, kind in KINDS.items() if command.startswith(begin)), None)
    return None


def snapshot_of(learner: int, role: str) -> Path | None:
    """Return the path of the shared memory into which a learner publishes a role's weights; None before the first
    publish."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for link in Path(f"/proc/{learner}/fd").iterdir():
            with suppress(FileNotFoundError):
                if f"memfd:sdft-{role}" in os.readlink(link):
                    return link
    return None
