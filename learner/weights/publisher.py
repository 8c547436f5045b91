"""Weights out of the learner: a versioned snapshot in shared memory, with digests and the probe's log-probs.

The memory is anonymous (memfd) and reached through the publishing process, so it is freed when that process ends. No
file is left behind, whichever process dies. Each role has one buffer, which its next version overwrites. The driver
publishes no version while an engine loads the one before it (services/fleet/versions.py).
"""

import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch.func import functional_call

from sdft.actors.shared.adapters import merged
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
        self, model: Path, dtype: torch.dtype, probe_ids: IntArray, node: str, vocabulary: int | None = None
    ) -> None:
        """node: Ray's node id of this machine. vocabulary: as in LearnerSettings."""
        self._node = node
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
        entries = copy_tensors(content.weights, buffer.memory)
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
            os.close(buffer.fd)  # the mapping ends with the last view of it

    def _probe_logprobs(self, entries: Sequence[TensorEntry], memory: mmap.mmap, scale: float | None) -> FloatArray:
        """Compute the probe's log-probs from the packed bytes, because engines of both roles must reproduce those.

        Raises ValueError if a parameter of the model is not among the tensors.
        """
        payload = torch.frombuffer(memory, dtype=torch.uint8)
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


def copy_tensors(weights: Iterable[tuple[str, torch.Tensor]], memory: mmap.mmap) -> tuple[TensorEntry, ...]:
    """Copy tensors end to end into `memory`, one at a time. Returns the place and the digest of each."""
    payload, view = torch.frombuffer(memory, dtype=torch.uint8), memoryview(memory)
    entries, offset = [], 0
    for name, tensor in weights:
        place = slice(offset, offset + tensor.nbytes)
        payload[place].copy_(tensor.contiguous().view(-1).view(torch.uint8))
        digest = xxhash.xxh3_128_hexdigest(view[place])
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, tensor.nbytes, digest))
        offset += tensor.nbytes
    return tuple(entries)
