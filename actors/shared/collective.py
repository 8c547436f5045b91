"""A group of the learner and the engines of a role, beside torch's default one: weights go to all of them at once.

    host ─► address, port ─► a Group at each member ─► broadcast, any number of times ─► close

NCCL on GPUs, gloo on CPUs, through the same calls. A group in which somebody has failed is of no more use: whoever
finds out closes it, the others hear of that or reach their deadline, and the next broadcast has another group.
"""

import re
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sdft.actors.shared.types import BroadcastFailed

BUCKET = 64 << 20  # bytes sent at once: large enough for a network's full rate, small beside a model
SEAL = 8  # bytes after a bucket's own: their sum
LOOK_S = 0.0005  # between two looks at work that is not done


def host(address: str) -> tuple[dist.TCPStore, int]:
    """Where the members of a group meet: a store that listens at this address only, and its port."""
    listening = socket.create_server((address, 0), backlog=1024)
    port = listening.getsockname()[1]
    return serve(listening), port


def serve(listening: socket.socket) -> dist.TCPStore:
    """A store behind a socket that listens already, which it takes over."""
    address, port = listening.getsockname()
    return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def visit(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The store that another member hosts."""
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


class Group:
    """One member's end. Made by all members at once: each waits for the others, `timeout_s` at most."""

    def __init__(
        self, store: dist.TCPStore, rank: int, size: int, device: torch.device, address: str, timeout_s: float
    ) -> None:
        """address: of this member's machine, where the others connect to it (gloo)."""
        self._store = store  # lives as long as the group
        limit = timedelta(seconds=timeout_s)
        # NCCL, once it connects, waits for a member that has been lost without a limit.
        store.set(f"here/{rank}", b"")
        store.wait([f"here/{i}" for i in range(size)], limit)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            # Torch's own watchdog ends the process: it is to find nothing, our deadlines come first.
            options._timeout = timedelta(days=1)
            self._group: dist.Backend = dist.ProcessGroupNCCL(store, rank, size, options)
            try:  # the first one connects
                self.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), time.monotonic() + timeout_s)
            except BroadcastFailed:
                self.close()
                raise
            return
        gloo = dist.ProcessGroupGloo._Options()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        gloo._timeout, gloo._threads = limit, 1
        store.set_timeout(limit)
        self._group = dist.ProcessGroupGloo(store, rank, size, gloo)

    def broadcast(self, tensor: Tensor, deadline: float) -> None:
        """Fill `tensor` [N] uint8 of every member with that of rank 0. deadline: on the monotonic clock.

        BroadcastFailed if it passes, or a member is lost.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            work = self._group.broadcast([tensor], options)
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise BroadcastFailed("a member of the group has not answered in time")
                time.sleep(LOOK_S)
            work.wait()
        except RuntimeError as error:
            # gloo begins with its source file, and ends with advice.
            raise BroadcastFailed(re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0]) from error

    def close(self) -> None:
        """Leave; the others find out."""
        self._group.abort()
        del self._group  # gloo closes its connections with it


def cut(sizes: Sequence[int]) -> list[range]:
    """Neighbouring tensors that are sent at once, by index: of BUCKET bytes together, or one that is larger."""
    cuts, start, nbytes = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and nbytes + size > BUCKET:
            cuts.append(range(start, i))
            start, nbytes = i, 0
        nbytes += size
    return [*cuts, range(start, len(sizes))] if sizes else []


def bucket(nbytes: int, device: torch.device) -> Tensor:
    """Room for so many bytes and their seal: uint8."""
    return torch.empty(-(-nbytes // SEAL) * SEAL + SEAL, dtype=torch.uint8, device=device)


def seal(full: Tensor) -> None:
    """Write the sum of a bucket's bytes, as integers of 8, behind them."""
    full.view(torch.int64)[-1] = full[:-SEAL].view(torch.int64).sum()


def whole(full: Tensor) -> bool:
    """Whether a bucket is what was sealed: a sum finds what is lost or changed on the way, and a GPU can form it."""
    return bool(full.view(torch.int64)[-1] == full[:-SEAL].view(torch.int64).sum())
