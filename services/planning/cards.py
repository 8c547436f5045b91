"""The GPUs of a run: how much memory one has, and which processes Ray puts on each."""

import subprocess
from collections.abc import Sequence
from contextlib import suppress

from sdft.services.config.run import RunConfig
from sdft.services.planning.parts import Part

ANSWER_S = 20  # limit for nvidia-smi, which takes seconds on a machine with many GPUs
QUERY = ("nvidia-smi", "--query-gpu=memory.total,memory.reserved", "--format=csv,noheader,nounits")
MIB_PER_GIB = 1024
UNIT = 10_000  # Ray counts GPUs in such parts


def card_gib(config: RunConfig) -> float | None:
    """Return the memory of a GPU of the run in GiB: as configured, or of this machine's smallest; None: not known.

    The GPUs of a running cluster are known only from the configuration.
    """
    if config.device != "cuda":
        return None
    if config.ray.gpu_memory_gib is not None or config.ray.running is not None:
        return config.ray.gpu_memory_gib
    return min(_found(), default=None)


def _found() -> list[float]:
    """Return the memory of each GPU of this machine in GiB, without what its driver reserves.

    Nothing if nvidia-smi is absent or does not answer.
    """
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=ANSWER_S, check=True)
        mib = [map(float, line.split(",")) for line in answer.stdout.splitlines() if line.strip()]
        return [(total - reserved) / MIB_PER_GIB for total, reserved in mib]
    return []


def cards(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the processes on each GPU, as Ray places them in this order.

    A fraction of a GPU goes to the GPU in use that it fills most; a process with whole GPUs has them alone.
    """
    placed: list[list[Part]] = []
    free: list[int] = []
    for part in parts:
        need = round(part.gpus * UNIT)
        if need >= UNIT:
            placed.append([part])  # it uses the first of several
            free.append(0)
        elif need > 0:
            fits = [i for i, left in enumerate(free) if left >= need]
            if not fits:
                placed.append([])
                free.append(UNIT)
                fits = [len(free) - 1]
            best = min(fits, key=lambda i: free[i])
            placed[best].append(part)
            free[best] -= need
    return placed
