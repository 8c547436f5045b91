"""The processes of a vLLM engine: forked from the actor's process and killed with it, without leftover names.

    actor ─► EngineCore, which computes by itself     or     actor ─► EngineCore ─► a worker for each part of the model

The second is for tensor_parallel above 1.
"""

import multiprocessing.context
import multiprocessing.process
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sdft.actors.shared.process import die_with_parent
from sdft.actors.vllm.compat_processes import (
    errors_of_workers,
    processes_by,
    set_title,
    unlink_semaphores,
    unlink_shared_memory,
)

LONGEST_LINE = 600  # characters of an error message


class EngineProcess(multiprocessing.context.ForkProcess):
    """vLLM's engine process, as a fork of the actor's process, or a worker's, as a fork of the engine process."""

    def __init__(self, together: "list[EngineProcess]", *args: Any, **kwargs: Any) -> None:
        """together: the processes of the engine that this process knows; its fork adds its own workers."""
        super().__init__(*args, **kwargs)
        self._together = together
        self._told = os.fdopen(os.memfd_create("sdft-failure"), "r+b", buffering=0)  # shared with the fork

    @property
    def told(self) -> str:
        """The error that the process has told; otherwise ""."""
        return os.pread(self._told.fileno(), 4 * LONGEST_LINE, 0).decode()

    @property
    def failure(self) -> str:
        """The error that the process raised, or the signal that killed it, except vLLM's SIGTERM; otherwise ""."""
        if self.told or self.exitcode is None or self.exitcode >= 0 or self.exitcode == -signal.SIGTERM:
            return self.told
        return f"its process was killed by {signal.Signals(-self.exitcode).name}"

    def tell(self, failure: str) -> None:
        """Tell the parent a failure."""
        os.pwrite(self._told.fileno(), failure.encode(), 0)

    def run(self) -> None:
        die_with_parent()
        set_title(f"VLLM::{self.name}")
        try:
            super().run()
        except Exception as error:
            # An error of a worker is the cause. Those that only wait for it are killed.
            workers = [process for process in self._together if process is not self]
            causes = [w.told for w in workers if w.told] + [w.failure for w in workers if w.failure]
            self.tell(causes[0] if causes else error_line(error))
            raise


@contextmanager
def forked(processes: list[EngineProcess]) -> Iterator[None]:
    """Make vLLM fork the engines created inside the context. In a Ray actor it would spawn them and import all again.

    processes: receives the forked processes.
    The second import takes as long as the rest of a start: 25 s instead of 5 on a GPU, with 16 busy cores. The fork has
    none of the actor's threads and uses no part of Ray.
    """

    class Context(multiprocessing.context.ForkContext):
        def Process(self, *args: Any, **kwargs: Any) -> EngineProcess:  # type: ignore[override]
            processes.append(EngineProcess(processes, *args, **kwargs))
            return processes[-1]

    with processes_by(Context), errors_of_workers(_tell):
        yield


def _tell(error: Exception) -> None:
    process = multiprocessing.process.current_process()
    assert isinstance(process, EngineProcess)
    process.tell(error_line(error))


def forget_names() -> None:
    """Remove names of open resources that are not needed after the start and that a kill would leave behind."""
    unlink_semaphores()  # one of the executor, one of tqdm
    unlink_shared_memory()
    # The rendezvous file of the engine's ranks. Several on GPUs may open it again, when NCCL connects at a first use.
    if torch.distributed.get_world_size() > 1 and torch.cuda.is_initialized():
        return
    store = torch.distributed.group.WORLD.get_group_store()
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    if isinstance(store, torch.distributed.FileStore):
        Path(store.path).unlink(missing_ok=True)


def error_line(error: BaseException) -> str:
    """An error's type and text in one line, cut after LONGEST_LINE characters, for channels that carry text only."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} …"
