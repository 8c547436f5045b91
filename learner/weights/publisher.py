"""Weights out of the learner: a versioned snapshot in shared memory, with digests and the probe's log-probs.

The memory is anonymous (memfd) and reached through the publishing process, so it is freed when that process ends. No
file is left behind, whichever process dies. Each role has one buffer, which its next version overwrites. The driver
publishes no version while an engine loads the one before it (services/fleet/versions.py).
"""

import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import functional_call

from sdft.actors.shared.adapters import merged
from sdft.actors.shared.digests import PIECE, digest, digest_threads
from sdft.actors.shared.pinned import pin, unpin
from sdft.actors.shared.process import anonymous_memory
from sdft.actors.shared.types import FloatArray, IntArray, Snapshot, TensorEntry
from sdft.learner.model.student import Probe
from sdft.learner.weights.content import Content


@dataclass
class _Buffer:
    fd: int
    memory: mmap.mmap


class Publisher:
    """Packs snapshots, on the learner's first rank."""

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype,
        probe_ids: IntArray,
        node: str,
        vocabulary: int | None = None,
        device: str = "cpu",
    ) -> None:
        """node: Ray's node id of this machine. vocabulary: as in LearnerSettings. device: of the weights."""
        self._node = node
        self._device = device
        self._model = model
        self._probe = Probe(model, dtype, vocabulary)
        self._dtype = dtype
        self._probe_ids = probe_ids
        self._buffers: dict[str, _Buffer] = {}

    def publish(self, role: str, version: int, content: Content) -> Snapshot:
        """Copy the weights into shared memory, over the role's last snapshot."""
        buffer = self._buffers.get(role)
        if buffer is None:
            buffer = self._buffers[role] = _Buffer(*anonymous_memory(f"sdft-{role}", content.nbytes))
            if self._device == "cuda":
                pin(_bytes(buffer.memory))
        entries = copy_tensors(content.weights, buffer.memory, torch.get_num_threads())
        return Snapshot(
            role=role,
            version=version,
            path=f"/proc/{os.getpid()}/fd/{buffer.fd}",
            node=self._node,
            nbytes=content.nbytes,
            tensors=entries,
            probe_ids=self._probe_ids,
            probe_logprobs=self._probe_logprobs(entries, buffer.memory, content.scale),
            scale=content.scale,
        )

    def forget(self, role: str) -> None:
        """Free the memory of a role's snapshot, once no process has mapped it."""
        buffer = self._buffers.pop(role, None)
        if buffer is not None:
            if self._device == "cuda":
                unpin(_bytes(buffer.memory))
            os.close(buffer.fd)  # the mapping ends with the last view of it

    def _probe_logprobs(self, entries: Sequence[TensorEntry], memory: mmap.mmap, scale: float | None) -> FloatArray:
        """Compute the probe's log-probs from the packed bytes, because engines of both roles must reproduce those.

        Raises ValueError if a parameter of the model is not among the tensors.
        """
        payload = _bytes(memory)
        tensors = {
            e.name: payload[e.offset : e.offset + e.nbytes].view(getattr(torch, e.dtype)).view(e.shape) for e in entries
        }
        if scale is not None:
            tensors = dict(merged(self._model, tensors, scale, self._dtype))
        parameters = self._probe.parameters_of(tensors)
        ids = torch.from_numpy(self._probe_ids.astype(np.int64))
        with torch.no_grad():
            return functional_call(self._probe, parameters, (ids,)).numpy()

    def payload(self, role: str) -> NDArray[np.uint8]:
        """Return the bytes of the role's last snapshot without a copy. They change when the next one is published."""
        return np.frombuffer(self._buffers[role].memory, np.uint8)


def copy_tensors(
    weights: Iterable[tuple[str, torch.Tensor]], memory: mmap.mmap, threads: int
) -> tuple[TensorEntry, ...]:
    """Copy tensors end to end into `memory`, one at a time. Returns the place and the digest of each.

    A piece of them is digested while the next one is copied. threads: as digest_threads. Tensors on a GPU are copied
    without waiting, at the full rate if `memory` is pinned.
    """
    payload, view = _bytes(memory), memoryview(memory)
    digested: list[Future[list[TensorEntry]]] = []
    with digest_threads(threads) as pool:
        piece: list[TensorEntry] = []
        offset = 0
        for name, tensor in weights:
            there = payload[offset : offset + tensor.nbytes]
            there.copy_(tensor.contiguous().view(-1).view(torch.uint8), non_blocking=tensor.is_cuda)
            dtype = str(tensor.dtype).removeprefix("torch.")
            piece.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, tensor.nbytes, ""))
            offset += tensor.nbytes
            if offset - piece[0].offset >= PIECE:
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


def _bytes(memory: mmap.mmap) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)
