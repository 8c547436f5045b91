"""The processes of an engine, and calls to them, by names that are not documented. Known for the versions in compat.py.

    actor ─► engine's process ─► a worker for each part of an engine that is split

Forked, titled, and without names in /dev/shm that a kill would leave behind. tests/actors/vllm/test_compat.py has one
line for each name and fails without it.
"""

import functools
import glob
import multiprocessing.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any

import ray
import vllm.v1.engine.utils
import vllm.v1.executor.multiproc_executor
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

RPC_FAILED = "Call to collective_rpc method failed: "  # prefix that vLLM adds to the text of an error in its process

WORKER_FAILED = "Worker failed with error '", "', please check the stack trace above for the root cause"  # around it

SHARED = Path("/dev/shm")
QUEUE = "psm_"  # names of multiprocessing.shared_memory begin with it


@contextmanager
def processes_by(context: Callable[[], Any]) -> Iterator[None]:
    """Make vLLM create an engine's process with the multiprocessing context that `context` returns, inside the block.

    A fork made in the block stays in it, so it creates the processes of its workers in the same way.
    Replaces get_mp_context of vllm.v1.engine.utils and vllm.v1.executor.multiproc_executor. vLLM always spawns in a Ray
    actor and has no option for it.
    """
    modules = vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor
    own = [module.get_mp_context for module in modules]
    for module in modules:
        module.get_mp_context = context
    try:
        yield
    finally:
        for module, get in zip(modules, own, strict=True):
            module.get_mp_context = get


@contextmanager
def errors_of_workers(tell: Callable[[Exception], None]) -> Iterator[None]:
    """Make a worker process that cannot start call `tell` with its error, if it is forked inside the block.

    Replaces WorkerProc.__init__. vLLM only writes this error to a log, and raises one that refers to the log.
    """
    own = WorkerProc.__init__

    @functools.wraps(own)
    def told(*args: Any, **kwargs: Any) -> None:
        try:
            own(*args, **kwargs)
        except Exception as error:
            tell(error)
            raise

    WorkerProc.__init__ = told
    try:
        yield
    finally:
        WorkerProc.__init__ = own


def take_all_answers() -> None:
    """Make an engine take the answers of all workers to a call of which one fails.

    Replaces MultiprocExecutor.collective_rpc, which reads response_mqs one after the other. vLLM stops at the first
    failure, and takes the answers after it for those to the next call.
    """
    own = MultiprocExecutor.collective_rpc

    @functools.wraps(own)
    def call(self: Any, *args: Any, **named: Any) -> Any:
        if named.get("unique_reply_rank") is not None:
            return own(self, *args, **named)
        queues = self.response_mqs
        left = self.response_mqs = iter(queues)
        try:
            return own(self, *args, **named)
        except RuntimeError:
            for queue in left:
                queue.dequeue()
            raise
        finally:
            self.response_mqs = queues

    MultiprocExecutor.collective_rpc = call


def rpc_error(error: Exception) -> str:
    """The text of an error in a worker, without what vLLM adds to it on the way to the client."""
    text = str(error).removeprefix(RPC_FAILED)
    return text.removeprefix(WORKER_FAILED[0]).removesuffix(WORKER_FAILED[1])


def set_title(title: str) -> None:
    """Set this process's title. Uses ray._raylet.setproctitle.

    The package setproctitle, which vLLM uses, has no effect in a fork of a process that Ray has renamed.
    """
    ray._raylet.setproctitle(title)


def unlink_semaphores() -> None:
    """Remove the names in /dev/shm of this process's semaphores, which multiprocessing removes only at a clean exit.

    Uses multiprocessing.util._finalizer_registry, Finalize._callback and SemLock._cleanup.
    """
    for finalizer in list(multiprocessing.util._finalizer_registry.values()):  # type: ignore[attr-defined]
        if finalizer._callback is SemLock._cleanup:  # type: ignore[attr-defined]
            finalizer()


def unlink_shared_memory() -> None:
    """Remove the names in /dev/shm of the queues by which the processes of an engine exchange calls and answers.

    All of them must have mapped the queues. Otherwise Python's resource tracker would remove the names of a killed
    engine, and warn in its log. Uses the prefix of the names of multiprocessing.shared_memory.
    """
    mapped = {line.partition(f" {SHARED}/")[2] for line in Path("/proc/self/maps").read_text().splitlines()}
    for name in mapped:
        if name.startswith(QUEUE):
            with suppress(FileNotFoundError):  # another worker was faster
                (SHARED / name).unlink()
                resource_tracker.unregister(f"/{name}", "shared_memory")


def unlink_shared_tensors() -> None:
    """Make the workers of an engine on a CPU remove the names in /dev/shm of the memory by which they exchange tensors.

    They do it as soon as all have mapped it, where vLLM does it at a clean exit only. Replaces
    _CPUSHMDistributed._init_cpu_shm, which waits for all. The names begin with its group_name.
    """
    own = _CPUSHMDistributed._init_cpu_shm

    @functools.wraps(own)
    def nameless(self: Any) -> int:
        handle: int = own(self)
        for path in SHARED.glob(f"{glob.escape(self.group_name)}*"):
            path.unlink(missing_ok=True)
        return handle

    _CPUSHMDistributed._init_cpu_shm = nameless
