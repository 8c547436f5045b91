"""The process of a vLLM engine: forked from the actor's process and killed with it, without leftover names."""

import multiprocessing.context
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sdft.actors.shared.process import die_with_parent
from sdft.actors.vllm.compat import processes_by, set_title, unlink_semaphores

LONGEST_LINE = 600  # characters of an error message


class EngineProcess(multiprocessing.context.ForkProcess):
    """vLLM's engine process, as a fork of the actor's process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told = os.fdopen(os.memfd_create("sdft-failure"), "r+b", buffering=0)  # shared with the fork

    @property
    def failure(self) -> str:
        """The error that the process raised, or the signal that killed it, except vLLM's SIGTERM; otherwise ""."""
        told = os.pread(self._told.fileno(), 4 * LONGEST_LINE, 0).decode()
        if told or self.exitcode is None or self.exitcode >= 0 or self.exitcode == -signal.SIGTERM:
            return told
        return f"its process was killed by {signal.Signals(-self.exitcode).name}"

    def run(self) -> None:
        die_with_parent()
        set_title("VLLM::EngineCore")
        try:
            super().run()
        except Exception as error:
            os.pwrite(self._told.fileno(), error_line(error).encode(), 0)
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
            processes.append(EngineProcess(*args, **kwargs))
            return processes[-1]

    with processes_by(Context):
        yield


def forget_names() -> None:
    """Remove names of open resources that are not needed after the start and that a kill would leave behind."""
    unlink_semaphores()  # one of the executor, one of tqdm
    # The rendezvous file of the engine's ranks.
    store = torch.distributed.group.WORLD.get_group_store()
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    if isinstance(store, torch.distributed.FileStore):
        Path(store.path).unlink(missing_ok=True)


def error_line(error: BaseException) -> str:
    """An error's type and text in one line, cut after LONGEST_LINE characters, for channels that carry text only."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} …"
