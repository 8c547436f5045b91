"""Saving while the learner continues: a thread writes the files from the live tensors until these change."""

import os
import re
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sdft.actors.shared.process import GIB, available_memory_gib, usual_mode

OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in the text of a SafetensorError, which has no errno


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file to write."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def write(self) -> None:
        """Write the file without a flush to the disk, which `checkpoints.commit` does.

        Raises OSError, with its errno, if it cannot be written.
        """
        try:
            with usual_mode(self.path):
                save_file(self.tensors, self.path, self.metadata)
        except SafetensorError as error:
            number = OS_ERROR.search(str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(self.path)) from error


class Saver:
    """Writes files in order in a thread, one set of files at a time."""

    def __init__(self) -> None:
        self._waiting: deque[TensorFile] = deque()
        self._lock = threading.Lock()  # guards the queue
        self._writing = threading.Lock()  # held while a file is written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._done: Future[None] | None = None

    def begin(self, files: Iterable[TensorFile]) -> None:
        """Start to write. The tensors must not change before `detach` returns."""
        self.finish()
        self._waiting.extend(files)
        self._done = self._thread.submit(self._run)

    def detach(self) -> None:
        """Copy the tensors of files that are not yet written, and wait for the file in progress.

        Call it before the tensors change. If the copy would take more than half of the free memory, it waits for all
        files instead.
        """
        with self._lock:
            needed = sum(t.nbytes for file in self._waiting for t in file.tensors.values())
        done = self._done
        if done is not None and 2 * needed > available_memory_gib() * GIB:
            wait([done])
        with self._lock:
            for i, file in enumerate(self._waiting):
                copies = {name: t.to("cpu", copy=True) for name, t in file.tensors.items()}
                self._waiting[i] = replace(file, tensors=copies)
        with self._writing:
            pass

    def finish(self) -> None:
        """Wait until all files are written. Raises the error that stopped the writing, once."""
        done = self._done
        if done is not None:
            try:
                done.result()
            finally:
                self._done = None  # not earlier: another thread may call `detach` meanwhile

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    if not self._waiting:
                        return
                    file = self._waiting.popleft()
                    self._writing.acquire()
                try:
                    file.write()
                finally:
                    self._writing.release()
        finally:
            with self._lock:
                self._waiting.clear()  # after a failed file the rest is not written
