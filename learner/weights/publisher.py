"""Weights out of the learner: a versioned snapshot in a buffer, with digests and the probe's log-probs.

Each role has one buffer (buffers.py), which its next version overwrites. The driver publishes no version while an
engine loads the one before it (services/fleet/versions.py).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from sdft.actors.shared.adapters import merged
from sdft.actors.shared.packed import unpack
from sdft.actors.shared.types import FloatArray, IntArray, Snapshot, TensorEntry
from sdft.learner.model.student import Probe
from sdft.learner.weights.buffers import GpuMemory, HostMemory
from sdft.learner.weights.content import Content


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
        on_gpu: bool = False,
    ) -> None:
        """node: Ray's node id of this machine. vocabulary: as in LearnerSettings.

        device: torch's name, of the weights. on_gpu: pack them there, and compute the probe there.
        """
        self._node = node
        self._device, self._on_gpu = torch.device(device), on_gpu
        self._model = model
        self._probe = Probe(model, dtype, vocabulary)
        self._dtype = dtype
        self._probe_ids = probe_ids
        self._buffers: dict[str, HostMemory | GpuMemory] = {}

    def publish(self, role: str, version: int, content: Content) -> Snapshot:
        """Pack the weights over the role's last snapshot."""
        buffer = self._buffers.get(role)
        if buffer is None:
            buffer = self._buffers[role] = self._buffer(role, content.nbytes)
        entries = buffer.fill(content.weights)
        return Snapshot(
            role=role,
            version=version,
            path=buffer.path,
            node=self._node,
            nbytes=content.nbytes,
            tensors=entries,
            probe_ids=self._probe_ids,
            probe_logprobs=self._probe_logprobs(entries, buffer.payload, content.scale),
            scale=content.scale,
        )

    def payload(self, role: str) -> Tensor:
        """Return the buffer of the role, [nbytes] uint8. Its bytes change when the next version is published."""
        return self._buffers[role].payload

    def host_bytes(self, role: str) -> NDArray[np.uint8]:
        """Return the bytes of the role's last snapshot in main memory: without a copy if they were packed there."""
        payload = self.payload(role)
        # A separate stream on a GPU, so that the copy does not wait for the step in progress.
        with torch.cuda.stream(torch.cuda.Stream(payload.device) if payload.is_cuda else None):
            return payload.cpu().numpy()

    def forget(self, role: str) -> None:
        """Free the memory of a role's snapshot, once no process has mapped it."""
        buffer = self._buffers.pop(role, None)
        if buffer is not None:
            buffer.close()

    def _buffer(self, role: str, nbytes: int) -> HostMemory | GpuMemory:
        return GpuMemory(nbytes, self._device) if self._on_gpu else HostMemory(f"sdft-{role}", nbytes, self._device)

    def _probe_logprobs(self, entries: Sequence[TensorEntry], payload: Tensor, scale: float | None) -> FloatArray:
        """Compute the probe's log-probs from the packed bytes, because engines of both roles must reproduce those.

        Raises ValueError if a parameter of the model is not among the tensors.
        """
        device = payload.device
        tensors = dict(unpack(payload, entries))
        if scale is not None:
            tensors = dict(merged(self._model, tensors, scale, self._dtype))
        held = self._probe.parameters_of(tensors) | dict(self._probe.named_buffers())
        ids = torch.from_numpy(self._probe_ids.astype(np.int64)).to(device)
        with torch.no_grad():
            on_device = {name: tensor.to(device) for name, tensor in held.items()}
            return functional_call(self._probe, on_device, (ids,)).cpu().numpy()
