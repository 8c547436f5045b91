"""One copy of a snapshot per node other than the learner's: fetched once, mapped by every engine on the node.

the learner's shared memory ─► Ray's object store, once per node ─► this process's shared memory ─► engines
"""

import mmap
import os
from collections.abc import Sequence

import numpy as np
import ray

from sdft.actors.shared.process import anonymous_memory


class SnapshotRelay:
    """Ray actor that holds one copy per role, as the learner's publisher holds the originals."""

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[int, mmap.mmap]] = {}

    def store(self, role: str, payload: Sequence[ray.ObjectRef]) -> str:
        """Overwrite the role's copy with `payload`, a list of one reference. Returns the path to map the copy from."""
        data: np.ndarray = ray.get(payload[0])  # a view into the node's object store
        held = self._buffers.get(role)
        if held is not None and len(held[1]) != data.nbytes:
            del self._buffers[role]
            held[1].close()
            os.close(held[0])  # an engine that has mapped it keeps the memory until it has loaded it
            held = None
        if held is None:
            self._buffers[role] = held = anonymous_memory(f"sdft-relay-{role}", data.nbytes)
        np.copyto(np.frombuffer(held[1], np.uint8), data)
        return f"/proc/{os.getpid()}/fd/{held[0]}"
