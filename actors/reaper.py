"""Ends a process on any node of the cluster, also one that was stopped.

`ray.kill` asks the worker first, and has been seen to leave one that does not answer: it then holds its resources, and
whoever is to take its place waits for ever.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdft.actors.shared.types import Process


def end(process: Process) -> None:
    """Kill a Ray worker by its number, by a task on its node. Returns at once; nothing is done if it is gone."""
    place = NodeAffinitySchedulingStrategy(process.node, soft=False)
    ray.remote(_end).options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(process.pid)


def _end(pid: int) -> None:
    with suppress(FileNotFoundError, ProcessLookupError):
        # The number may be another process's by now; Ray's workers call themselves after what they run.
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
