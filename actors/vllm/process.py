"""The process of a vLLM engine: forked from the actor's, killed with it, and leaving no names behind."""

import ctypes
import multiprocessing.context
import multiprocessing.util
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import SemLock
from pathlib import Path

import ray
import torch
import vllm.v1.engine.utils

PR_SET_PDEATHSIG = 1


class _EngineProcess(multiprocessing.context.ForkProcess):
    """vLLM's process for the engine, as a fork of the actor's."""

    def run(self) -> None:
        die_with_parent()
        # As vLLM would, but in a fork of a process that Ray has renamed its way of doing so has no effect.
        ray._raylet.setproctitle("VLLM::EngineCore")
        super().run()


class _ForkContext(multiprocessing.context.ForkContext):
    Process = _EngineProcess


@contextmanager
def forked() -> Iterator[None]:
    """vLLM forks the engines that are made in it: in a Ray actor it would spawn them, to import all of it once more.

    That is as long as all the rest of a start: 25 s instead of 5 on a GPU, with 16 busy cores. The fork has none of the
    actor's threads, and uses nothing of Ray's.
    """
    spawning = vllm.v1.engine.utils.get_mp_context
    vllm.v1.engine.utils.get_mp_context = _ForkContext
    try:
        yield
    finally:
        vllm.v1.engine.utils.get_mp_context = spawning


def die_with_parent() -> None:
    """This process is killed when the one that started it ends, also when that one is killed."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def forget_names() -> None:
    """Remove what this process has open by a name that nobody needs any more, and that a kill would leave behind."""
    # Semaphores in /dev/shm (the executor has one, tqdm another): what multiprocessing would do at a clean exit.
    for finalizer in list(multiprocessing.util._finalizer_registry.values()):  # type: ignore[attr-defined]
        if finalizer._callback is SemLock._cleanup:  # type: ignore[attr-defined]
            finalizer()
    # The file in which the ranks of an engine met.
    store = torch.distributed.distributed_c10d._get_default_store()
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    if isinstance(store, torch.distributed.FileStore):
        Path(store.path).unlink(missing_ok=True)
