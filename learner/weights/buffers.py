"""Memory that holds the newest snapshot of a role, with the digests of its tensors.

    HostMemory   main memory, which engines map by its path     xxh3, by threads beside the copy
    GpuMemory    of the learner's GPU                           sums, by the GPU (actors/shared/sums.py)

Host memory is anonymous (memfd) and reached through the learner's process, so the kernel frees it when that process
ends. No file is left behind, whichever process dies.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor

from sdft.actors.shared.digests import PIECE, digest, digest_threads
from sdft.actors.shared.packed import pack
from sdft.actors.shared.pinned import pin, unpin
from sdft.actors.shared.process import anonymous_memory
from sdft.actors.shared.sums import sum_digests
from sdft.actors.shared.types import TensorEntry

Weights = Iterable[tuple[str, Tensor]]


class HostMemory:
    """A buffer in main memory, pinned for weights on a GPU."""

    def __init__(self, name: str, nbytes: int, device: torch.device) -> None:
        """device: of the weights."""
        self._fd, memory = anonymous_memory(name, nbytes)
        self.payload = torch.frombuffer(memory, dtype=torch.uint8)  # [nbytes]
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._pinned = device.type == "cuda" and pin(self.payload)

    def fill(self, weights: Weights) -> tuple[TensorEntry, ...]:
        """Pack weights, over those before. Returns the place and the digest of each."""
        return copy_tensors(weights, self.payload, torch.get_num_threads())

    def close(self) -> None:
        """Free the memory, once no process has mapped it and no tensor is a view of `payload`."""
        if self._pinned:
            unpin(self.payload)
        os.close(self._fd)


class GpuMemory:
    """A buffer on the device of the weights."""

    path = ""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.payload = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def fill(self, weights: Weights) -> tuple[TensorEntry, ...]:
        """As HostMemory.fill. Waits for the GPU: afterwards other processes may read the buffer."""
        entries = list(pack(weights, self.payload))
        digests = sum_digests(self.payload, entries)
        return tuple(replace(entry, digest=one) for entry, one in zip(entries, digests, strict=True))

    def close(self) -> None:
        """Do nothing: torch frees the memory with the last tensor on it, unless another process has opened it."""


def copy_tensors(weights: Weights, payload: Tensor, threads: int) -> tuple[TensorEntry, ...]:
    """Copy tensors end to end into main memory [nbytes] uint8. Returns the place and the digest of each.

    A piece of them is digested while the next one is copied. threads: as digest_threads. Tensors on a GPU are copied
    without waiting, at the full rate if the memory is pinned.
    """
    view = memoryview(payload.numpy())
    digested: list[Future[list[TensorEntry]]] = []
    with digest_threads(threads) as pool:
        piece: list[TensorEntry] = []
        for entry in pack(weights, payload):
            piece.append(entry)
            if entry.offset + entry.nbytes - piece[0].offset >= PIECE:
                digested.append(pool.submit(_digested, view, piece, _copied()))
                piece = []
        digested.append(pool.submit(_digested, view, piece, _copied()))
    return tuple(entry for of_piece in digested for entry in of_piece.result())


def _digested(view: memoryview, piece: Sequence[TensorEntry], copied: torch.cuda.Event | None) -> list[TensorEntry]:
    if copied is not None:
        copied.synchronize()
    return [replace(e, digest=digest(view[e.offset : e.offset + e.nbytes])) for e in piece]


def _copied() -> torch.cuda.Event | None:
    """Return an event that a GPU reaches after the copies so far; None if this process uses no GPU."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(blocking=True)  # a thread that waits lets others compute
    event.record()
    return event
