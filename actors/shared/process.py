"""What processes of ours know of their machine and set up before they import torch. Standard library only."""

import fcntl
import gc
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GIB = 1 << 30


def waiting(alone: bool) -> dict[str, str]:
    """Environment that says how OpenMP threads wait for work.

    They sleep: threads that spin make two processes on the same cores 30 times slower than one. alone: nobody else of
    the run computes while this process does. Then they spin for a fraction of a millisecond first, for a sleeping
    thread takes some 60 us to wake, and a layer is dozens of loops.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000" if alone else "0", "KMP_BLOCKTIME": "0"}


def kept_heap(device: str) -> dict[str, str]:
    """Environment in which glibc, from a process's start on, keeps what is freed by a learner that computes on a CPU.

    Given back, it comes again as pages that the kernel has to zero, and on a virtual machine its host to find. One heap
    for all threads: Ray calls from a thread, whose own heap would be pieces of 64 MiB that come and go. Other C
    libraries read other variables and go without. Nothing for a GPU: there main memory holds a model only while it is
    loaded.
    """
    if device != "cpu":
        return {}
    return {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}


@contextmanager
def scratch_folder(prefix: str, parent: str | None = None) -> Iterator[Path]:
    """A folder for sockets and the like, removed at the end; also those of this kind whose processes were killed.

    A folder belongs to the process that holds its lock, which the kernel lets go of when that process ends. parent:
    where it lies; None: where temporary files do.
    """
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*"):
        if os.access(folder, os.W_OK):
            with suppress(FileNotFoundError), (folder / ".lock").open("w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
    with (new / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = new.rename(new.with_name(new.name[1:]))  # seen by others only now that it is locked
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """The file that is written to `path` in it gets the permissions that any other gets, as the umask has it.

    safetensors gives it none but the owner's.
    """
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(stat.S_IMODE(mode))


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
