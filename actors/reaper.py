"""Kills a process on any node of the cluster, including one that is stopped.

`ray.kill` sends a request to the worker first and has been observed to leave an unresponsive worker alive. Such a
worker keeps its resources, and its replacement waits for ever.
"""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sdft.actors.shared.types import Process

SENT_S = 0.5


def end(process: Process) -> None:
    """Kill a Ray worker by process id, with a task on its node. Does nothing if it is gone.

    Returns within SENT_S. Ray sends the function to its control service at the first use, and would wait for ever if
    that service has ended.
    """
    place = NodeAffinitySchedulingStrategy(process.node, soft=False)
    task = ray.remote(_end).options(num_cpus=0, max_retries=0, scheduling_strategy=place)
    sending = threading.Thread(target=task.remote, args=[process.pid], daemon=True)
    sending.start()
    sending.join(SENT_S)


def _end(pid: int) -> None:
    with suppress(FileNotFoundError, ProcessLookupError):
        # The id may have been reused by another process. Ray workers set their title to "ray::" and what they run.
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
