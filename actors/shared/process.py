"""Process set-up before torch is imported, and properties of the machine. Standard library only."""

import ctypes
import fcntl
import gc
import mmap
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GIB = 1 << 30
PR_SET_PDEATHSIG = 1


def openmp_wait_policy(exclusive: bool) -> dict[str, str]:
    """Environment variables that set how OpenMP threads wait for work.

    Threads sleep, because spinning threads make two processes on the same cores 30 times slower than one.
    exclusive: no other process of the run computes while this one does. Threads then spin for a fraction of a
    millisecond before they sleep, because a sleeping thread takes some 60 us to wake and a layer is dozens of loops.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000" if exclusive else "0", "KMP_BLOCKTIME": "0"}


def kept_heap(device: str) -> dict[str, str]:
    """Environment variables that make glibc keep freed memory in a learner that computes on a CPU.

    glibc reads them at process start. Memory returned to the kernel comes back as pages that the kernel has to zero,
    and that the host of a virtual machine has to find. All threads share one heap: Ray calls from a thread, whose own
    heap would be 64 MiB pieces that come and go. Other C libraries ignore these variables. The result is empty for a
    GPU, where main memory holds a model only while it is loaded.
    """
    if device != "cpu":
        return {}
    return {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}


def anonymous_memory(name: str, nbytes: int) -> tuple[int, mmap.mmap]:
    """Return descriptor and mapping of new shared memory, which other processes map by /proc/PID/fd/DESCRIPTOR.

    The kernel frees it when the last process that holds it ends: no file is left behind.
    """
    fd = os.memfd_create(name)
    os.ftruncate(fd, nbytes)
    return fd, mmap.mmap(fd, nbytes)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, even if the parent is killed."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def scratch_folder(prefix: str, parent: str | None = None) -> Iterator[Path]:
    """A folder for sockets and the like, removed on exit. Also removes folders with this prefix of killed processes.

    A folder belongs to the process that holds its lock. The kernel releases the lock when that process ends.
    parent: the folder to create it in; None: the folder for temporary files.
    """
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*"):
        if os.access(folder, os.W_OK):
            with suppress(FileNotFoundError), (folder / ".lock").open("w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
    with (new / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = new.rename(new.with_name(new.name[1:]))  # visible to other processes only once it is locked
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give the file that is written to `path` inside the context the usual permissions, as set by the umask.

    safetensors sets the owner's permissions only.
    """
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(stat.S_IMODE(mode))


@contextmanager
def large_imports() -> Iterator[None]:
    """Context for importing thousands of modules: a fifth faster, because the garbage collector is off meanwhile.

    The modules stay excluded from collections afterwards, because they live until the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def collect_rarely() -> None:
    """Run the garbage collector a hundred times less often, for a process with many small objects.

    Each sample in flight is several objects. With 32,000 samples in flight, collections took a third of the
    controller's time (benchmarks.scale) and freed nothing, because reference counts already free finished samples.
    """
    gc.set_threshold(100_000, 50, 100)


def available_memory_gib(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Available main memory of this machine in GiB, including the file cache that the kernel can reclaim."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 / GIB
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
