"""The process of a vLLM engine: forked from the actor's, killed with it, and leaving no names behind."""

import ctypes
import multiprocessing.context
import multiprocessing.util
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any

import ray
import torch
import vllm.v1.engine.utils

PR_SET_PDEATHSIG = 1
LONGEST_LINE = 600  # characters of an error


class EngineProcess(multiprocessing.context.ForkProcess):
    """vLLM's process for the engine, as a fork of the actor's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told = os.fdopen(os.memfd_create("sdft-failure"), "r+b", buffering=0)  # shared with the fork

    @property
    def failure(self) -> str:
        """What the process raised, or the signal that killed it, but vLLM's own; "" if there is neither."""
        told = os.pread(self._told.fileno(), 4 * LONGEST_LINE, 0).decode()
        if told or self.exitcode is None or self.exitcode >= 0 or self.exitcode == -signal.SIGTERM:
            return told
        return f"its process was killed by {signal.Signals(-self.exitcode).name}"

    def run(self) -> None:
        die_with_parent()
        # As vLLM would, but in a fork of a process that Ray has renamed its way of doing so has no effect.
        ray._raylet.setproctitle("VLLM::EngineCore")
        try:
            super().run()
        except Exception as error:
            os.pwrite(self._told.fileno(), error_line(error).encode(), 0)
            raise


@contextmanager
def forked(processes: list[EngineProcess]) -> Iterator[None]:
    """vLLM forks the engines that are made in it: in a Ray actor it would spawn them, to import all of it once more.
    processes: is filled with them.

    That is as long as all the rest of a start: 25 s instead of 5 on a GPU, with 16 busy cores. The fork has none of the
    actor's threads, and uses nothing of Ray's.
    """

    class Context(multiprocessing.context.ForkContext):
        def Process(self, *args: Any, **kwargs: Any) -> EngineProcess:  # type: ignore[override]
            processes.append(EngineProcess(*args, **kwargs))
            return processes[-1]

    spawning = vllm.v1.engine.utils.get_mp_context
    vllm.v1.engine.utils.get_mp_context = Context
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


def error_line(error: BaseException) -> str:
    """An error's type and text, in one line, where only text gets through."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} …"
