"""What processes of ours know of their machine and set up before they import torch. Standard library only."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GIB = 1 << 30


def waiting(alone: bool) -> dict[str, str]:
    """Environment that says how OpenMP threads wait for work.

    They sleep: threads that spin make two processes on the same cores 30 times slower than one. alone: nobody else of
    the run computes while this process does. Then they spin for a fraction of a millisecond first, for a sleeping
    thread takes some 60 us to wake, and a layer is dozens of loops.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000" if alone else "0", "KMP_BLOCKTIME": "0"}


@contextmanager
def large_imports() -> Iterator[None]:
    """Import thousands of modules in it: a fifth faster, for the garbage collector does not walk them meanwhile.

    They stay out of its sight afterwards too, for they stay until the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def collect_rarely() -> None:
    """Let the garbage collector walk a process of many small objects a hundred times less often.

    Each sample in flight is some of them. With 32,000 samples in flight collections were a third of the controller's
    time (benchmarks.scale), and found nothing: what ends is freed by its count.
    """
    gc.set_threshold(100_000, 50, 100)


def available_memory_gib(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Main memory of this machine that could be used now, with what the kernel would give back of its file cache."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / GIB
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
