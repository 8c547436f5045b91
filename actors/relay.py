"""A node's own copy of a snapshot, for nodes other than the learner's: fetched once, mapped by every engine there.

the learner's shared memory ─► Ray's object store, once a node ─► this process's shared memory ─► engines
"""

import mmap
import os
from collections.abc import Sequence

import numpy as np
import ray


class SnapshotRelay:
    """The Ray actor that holds the copies, one of each role, as the learner's publisher holds the originals."""

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[int, mmap.mmap]] = {}

    def hold(self, role: str, payload: Sequence[ray.ObjectRef]) -> str:
        """Copy the role's newest payload, the only one in the list, over the one before; the path to map it by."""
        data: np.ndarray = ray.get(payload[0])  # a view of the node's object store, which has fetched it
        held = self._buffers.get(role)
        if held is not None and len(held[1]) != data.nbytes:
            del self._buffers[role]
            held[1].close()
            os.close(held[0])  # an engine that has it mapped keeps the memory until it has loaded it
            held = None
        if held is None:
            fd = os.memfd_create(f"sdft-relay-{role}")
            os.ftruncate(fd, data.nbytes)
            self._buffers[role] = held = fd, mmap.mmap(fd, data.nbytes)
        np.copyto(np.frombuffer(held[1], np.uint8), data)
        return f"/proc/{os.getpid()}/fd/{held[0]}"
