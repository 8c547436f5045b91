"""The learner's end of broadcasts: it sends a role's last snapshot from shared memory to all its engines at once."""

import time
from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import TCPStore

from sdft.actors.shared.collective import BroadcastGroup, bucket, cut, host, seal
from sdft.actors.shared.types import SnapshotDamaged, TensorEntry


class Broadcaster:
    """One group per role, formed anew whenever its members change."""

    def __init__(self, device: str, address: str) -> None:
        """address: the address of this machine."""
        self._device, self._address = torch.device(device), address
        self._stores: dict[str, TCPStore] = {}
        self._groups: dict[str, BroadcastGroup] = {}

    def meet(self, role: str) -> tuple[str, int]:
        """Return address and port at which the role's next group meets, and close its last group."""
        self.close(role)
        self._stores[role], port = host(self._address)
        return self._address, port

    def join(self, role: str, size: int, timeout_s: float) -> None:
        """Wait for the other members; `size` includes the learner. Raises RuntimeError if they do not join."""
        store = self._stores.pop(role)
        self._groups[role] = BroadcastGroup(store, 0, size, self._device, self._address, timeout_s)

    def send(self, role: str, payload: NDArray[np.uint8], entries: Sequence[TensorEntry], timeout_s: float) -> None:
        """Send the snapshot's bytes, bucket by bucket. Raises BroadcastFailed if not all members received them.

        Raises SnapshotDamaged if the bytes are not those that were packed. Either error closes the group.
        """
        deadline = time.monotonic() + timeout_s
        try:
            with torch.cuda.stream(self._stream):
                for part in cut([e.nbytes for e in entries]):
                    self._groups[role].broadcast(self._sealed(payload, entries[part.start : part.stop]), deadline)
        except BaseException:
            self.close(role)
            raise

    def _sealed(self, payload: NDArray[np.uint8], entries: Sequence[TensorEntry]) -> Tensor:
        for e in entries:
            if xxhash.xxh3_128_hexdigest(payload[e.offset : e.offset + e.nbytes].data) != e.digest:
                raise SnapshotDamaged(f"{e.name} is damaged in the learner's memory: its digest has changed")
        start, end = entries[0].offset, entries[-1].offset + entries[-1].nbytes
        full = bucket(end - start, self._device)
        full[: end - start].copy_(torch.from_numpy(payload[start:end]))
        seal(full)
        return full

    def close(self, role: str) -> None:
        """Close the role's group, if there is one. Its members detect that."""
        group = self._groups.pop(role, None)
        if group is not None:
            group.close()

    @property
    def _stream(self) -> torch.cuda.Stream | None:
        """A separate stream on a GPU, so that the learner's next step runs concurrently; None on a CPU."""
        return torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
