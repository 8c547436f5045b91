"""Host memory that is pinned for a GPU, which then copies from and to it at the full rate of its bus.

Copies of other memory go through a small buffer of CUDA's, at a quarter of that rate or less. Pinning itself takes time
for each page, so memory is pinned once for all versions of the weights. CUDA unpins it when the process ends.
"""

import logging
import mmap
import os
from contextlib import suppress
from typing import BinaryIO

import torch
from torch import Tensor

log = logging.getLogger(__name__)
READ_ONLY = 8  # cudaHostRegisterReadOnly


def pin(memory: Tensor, flags: int = 0) -> bool:
    """Pin host memory, a tensor [nbytes] uint8, and return whether CUDA could. Copies are slower if it could not.

    flags: READ_ONLY if it is mapped so.
    """
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, flags))
    except torch.cuda.CudaError as error:
        log.warning("%d bytes of host memory are not pinned, so copies take longer: %s", memory.nbytes, error)
        with suppress(RuntimeError):  # CUDA keeps the error until the next kernel reports it
            torch.zeros(1, device="cuda")
        return False
    return True


def unpin(memory: Tensor) -> None:
    """End what `pin` began. Raises CudaError."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))


def mapped(file: BinaryIO) -> memoryview:
    """Map a file whole, read-only."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class PinnedFile:
    """Maps files, one after the other, and keeps the last one pinned if it is anonymous memory.

    The next version comes in the same memory. Files of a user's own transport are mapped only: each version may be a
    new file.
    """

    def __init__(self) -> None:
        self._memory: memoryview | None = None
        self._of: os.stat_result | None = None
        self._pinned = False

    def map(self, file: BinaryIO) -> memoryview:
        """Map a file whole, read-only."""
        there = os.fstat(file.fileno())
        if self._memory is not None and self._of is not None:
            if os.path.samestat(there, self._of):
                return self._memory
            self.close()
        memory = mapped(file)
        if os.readlink(f"/proc/self/fd/{file.fileno()}").startswith("/memfd:"):
            self._pinned = pin(torch.frombuffer(memory, dtype=torch.uint8), READ_ONLY)
            self._memory, self._of = memory, there
        return memory

    def close(self) -> None:
        """Unpin the file, which stays mapped as long as a tensor is a view of it."""
        if self._memory is not None:
            if self._pinned:
                unpin(torch.frombuffer(self._memory, dtype=torch.uint8))
            self._memory = self._of = None
