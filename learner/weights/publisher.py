"""Weights out of the learner: a versioned snapshot in shared memory, with digests and the probe's log-probs.

The memory is anonymous (memfd) and reached through the publishing process, so it goes when that process goes: no file
is left behind, whoever dies. One buffer a role, used again for the next version once the engines have let go of it.
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
from sdft.actors.shared.types import FloatArray, IntArray, Snapshot, TensorEntry
from sdft.learner.model.student import Probe
from sdft.learner.weights.content import Content


@dataclass
class _Buffer:
    fd: int
    memory: mmap.mmap
    in_use: bool = False
    entries: tuple[TensorEntry, ...] = ()


class Publisher:
    """Packs snapshots, on the learner's first rank."""

    def __init__(self, model: Path, dtype: torch.dtype, probe_ids: IntArray, node: str) -> None:
        """node: Ray's id of this machine."""
        self._node = node
        self._model = model
        self._probe = Probe(model, dtype)
        self._probe_names = {name for name, _ in self._probe.named_parameters()}
        self._dtype = dtype
        self._probe_ids = probe_ids
        self._buffers: dict[str, _Buffer] = {}

    def publish(self, role: str, version: int, content: Content) -> Snapshot:
        """Copy the weights into shared memory. Raises RuntimeError if the role's last snapshot was not released."""
        buffer = self._buffers.get(role)
        if buffer is not None and buffer.in_use:
            raise RuntimeError(f"{role} weights v{version}: the snapshot before it was not released")
        if buffer is None:
            buffer = self._buffers[role] = _allocate(role, content.nbytes)
        entries = buffer.entries = pack(content.weights, buffer.memory)
        snapshot = Snapshot(
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
        buffer.in_use = True  # last: a snapshot that cannot be probed reaches no engine, and is never released
        return snapshot

    def _probe_logprobs(self, entries: Sequence[TensorEntry], memory: mmap.mmap, scale: float | None) -> FloatArray:
        """By these very bytes: what the engines must reproduce is what was sent, for student and teacher alike.

        ValueError if a parameter of the model is not among them.
        """
        payload = torch.frombuffer(memory, dtype=torch.uint8)
        tensors = {
            e.name: payload[e.offset : e.offset + e.nbytes].view(getattr(torch, e.dtype)).view(e.shape) for e in entries
        }
        if scale is not None:
            tensors = dict(merged(self._model, tensors, scale, self._dtype))
        # A folder may hold a tied head a second time.
        parameters = {f"model.{n}": t for n, t in tensors.items() if f"model.{n}" in self._probe_names}
        if missing := self._probe_names - parameters.keys():  # torch would compute on with memory that is not there
            raise ValueError(f"the weights to be published lack {min(missing).removeprefix('model.')}")
        ids = torch.from_numpy(self._probe_ids.astype(np.int64))
        with torch.no_grad():
            return functional_call(self._probe, parameters, (ids,)).numpy()

    def payload(self, role: str) -> NDArray[np.uint8]:
        """The bytes of the role's last snapshot, not copied; they stay what they are until the next is published."""
        return np.frombuffer(self._buffers[role].memory, np.uint8)

    def entries(self, role: str) -> Sequence[TensorEntry]:
        """What lies where in them."""
        return self._buffers[role].entries

    def release(self, role: str) -> None:
        """Every engine has loaded and verified the role's snapshot: its memory may be used again."""
        self._buffers[role].in_use = False


def pack(weights: Iterable[tuple[str, torch.Tensor]], memory: mmap.mmap) -> tuple[TensorEntry, ...]:
    """Copy tensors end to end into `memory`, one at a time; where each lies, and its digest."""
    payload, view = torch.frombuffer(memory, dtype=torch.uint8), memoryview(memory)
    entries, offset = [], 0
    for name, tensor in weights:
        here = slice(offset, offset + tensor.nbytes)
        payload[here].copy_(tensor.contiguous().view(-1).view(torch.uint8))
        digest = xxhash.xxh3_128_hexdigest(view[here])
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, tensor.nbytes, digest))
        offset += tensor.nbytes
    return tuple(entries)


def _allocate(role: str, nbytes: int) -> _Buffer:
    fd = os.memfd_create(f"sdft-{role}")
    os.ftruncate(fd, nbytes)
    return _Buffer(fd, mmap.mmap(fd, nbytes))
