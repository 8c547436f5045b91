"""A broadcast group of the learner and the engines of a role, separate from torch's default group.

    host ─► address, port ─► a BroadcastGroup at each member ─► send, receive, any number of times ─► close

The backend is NCCL on GPUs and gloo on CPUs, behind the same calls. A group is unusable after a member has failed. The
member that detects the failure closes the group, the others get an error or reach their deadline, and the next
broadcast uses a new group.
"""

import re
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sdft.actors.shared.compat import gloo_group, nccl_group
from sdft.actors.shared.digests import digest
from sdft.actors.shared.types import NotReceived, SnapshotDamaged, TensorEntry

BUCKET = 64 << 20  # bytes sent at once: large enough for a network's full rate, small compared with a model
SEAL = 8  # bytes of the checksum that follows a bucket's payload
LOOK_S = 0.0005  # polling interval


def host(address: str) -> tuple[dist.TCPStore, int]:
    """The store where the members of a group meet, listening at this address only, and its port."""
    listening = socket.create_server((address, 0), backlog=1024)
    port = listening.getsockname()[1]
    return serve(listening), port


def serve(listening: socket.socket) -> dist.TCPStore:
    """A store that takes over a listening socket."""
    address, port = listening.getsockname()
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def visit(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Connect to the store that another member hosts."""
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


class BroadcastGroup:
    """One member's end of a group. All members construct it together; each waits up to `timeout_s` for the others."""

    def __init__(
        self, store: dist.TCPStore, rank: int, size: int, device: torch.device | str, address: str, timeout_s: float
    ) -> None:
        """address: address of this member's machine, at which the others connect to it (gloo)."""
        self._store = store  # must live as long as the group
        self._device = device = torch.device(device)
        limit = timedelta(seconds=timeout_s)
        # NCCL, once connecting, waits for a lost member without a limit. So check first that all members are here.
        store.set(f"here/{rank}", b"")
        store.wait([f"here/{i}" for i in range(size)], limit)
        if device.type == "cuda":
            self._group = nccl_group(store, rank, size)
            try:  # the first broadcast connects
                self.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), time.monotonic() + timeout_s)
            except NotReceived:
                self.close()
                raise
            return
        store.set_timeout(limit)
        self._group = gloo_group(store, rank, size, address, limit)

    def broadcast(self, tensor: Tensor, deadline: float) -> None:
        """Fill `tensor` [N] uint8 of every member with that of rank 0. deadline: on the monotonic clock.

        Raises NotReceived if the deadline passes or a member is lost.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            work = self._group.broadcast([tensor], options)
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise NotReceived("a member of the group did not answer in time")
                time.sleep(LOOK_S)
            work.wait()
        except RuntimeError as error:
            # Messages of gloo begin with its source file and end with advice. Both are cut off.
            raise NotReceived(re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0]) from error

    def send(self, payload: NDArray[np.uint8], entries: Sequence[TensorEntry], deadline: float) -> None:
        """Send a snapshot's bytes as rank 0, bucket by bucket. NotReceived if not all members received them.

        Raises SnapshotDamaged if the bytes are not those that were packed.
        """
        # A separate stream on a GPU, so that the learner's next step runs concurrently.
        with torch.cuda.stream(torch.cuda.Stream(self._device) if self._device.type == "cuda" else None):
            for part in cut([e.nbytes for e in entries]):
                self.broadcast(_sealed(payload, entries[part.start : part.stop], self._device), deadline)

    def receive(self, entries: Sequence[TensorEntry], deadline: float) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a snapshot as they arrive. NotReceived if one is missing or damaged."""
        for part in cut([e.nbytes for e in entries]):
            in_bucket = entries[part.start : part.stop]
            start = in_bucket[0].offset
            full = bucket(in_bucket[-1].offset + in_bucket[-1].nbytes - start, self._device)  # vLLM keeps views of it
            self.broadcast(full, deadline)
            if not whole(full):
                raise NotReceived(
                    f"{in_bucket[0].name} or one of the {len(in_bucket) - 1} tensors after it arrived damaged"
                )
            for e in in_bucket:
                yield e.name, full[e.offset - start :][: e.nbytes].view(getattr(torch, e.dtype)).view(e.shape)

    def close(self) -> None:
        """Leave the group. The other members get an error or reach their deadline."""
        self._group.abort()
        del self._group  # gloo closes its connections when the object is freed


def cut(sizes: Sequence[int]) -> list[range]:
    """Index ranges of neighbouring tensors sent together: at most BUCKET bytes, or a single larger tensor."""
    cuts, start, nbytes = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and nbytes + size > BUCKET:
            cuts.append(range(start, i))
            start, nbytes = i, 0
        nbytes += size
    return [*cuts, range(start, len(sizes))] if sizes else []


def bucket(nbytes: int, device: torch.device) -> Tensor:
    """A uint8 buffer for `nbytes`, padded to a multiple of SEAL, and the seal."""
    return torch.empty(-(-nbytes // SEAL) * SEAL + SEAL, dtype=torch.uint8, device=device)


def _sealed(payload: NDArray[np.uint8], entries: Sequence[TensorEntry], device: torch.device) -> Tensor:
    """A bucket with the bytes of these tensors, which are neighbours."""
    for e in entries:
        if digest(payload[e.offset : e.offset + e.nbytes].data) != e.digest:
            raise SnapshotDamaged(f"{e.name} is damaged in the learner's memory: its digest has changed")
    start, end = entries[0].offset, entries[-1].offset + entries[-1].nbytes
    full = bucket(end - start, device)
    full[: end - start].copy_(torch.from_numpy(payload[start:end]))
    seal(full)
    return full


def seal(full: Tensor) -> None:
    """Write the sum of a bucket's payload, as 8-byte integers, behind the payload."""
    full.view(torch.int64)[-1] = full[:-SEAL].view(torch.int64).sum()


def whole(full: Tensor) -> bool:
    """Whether a bucket matches its seal. The sum detects lost or changed data, and a GPU can compute it."""
    return bool(full.view(torch.int64)[-1] == full[:-SEAL].view(torch.int64).sum())
