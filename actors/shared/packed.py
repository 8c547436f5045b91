"""The layout of a snapshot's payload: its tensors end to end, in memory of any device.

the learner: weights ─► pack ─► payload, places        an engine: payload, places ─► unpack ─► weights
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sdft.actors.shared.types import TensorEntry


def pack(weights: Iterable[tuple[str, Tensor]], payload: Tensor) -> Iterator[TensorEntry]:
    """Copy tensors into `payload` [nbytes] uint8, one at a time, and yield the place of each, without a digest.

    A copy from a GPU may still be in progress when the place is yielded.
    """
    offset = 0
    for name, tensor in weights:
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        payload[offset : offset + raw.nbytes].copy_(raw, non_blocking=raw.is_cuda)
        yield TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, raw.nbytes, "")
        offset += raw.nbytes


def unpack(payload: Tensor, entries: Sequence[TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of each entry, as a view of `payload` [nbytes] uint8."""
    for e in entries:
        yield e.name, payload[e.offset : e.offset + e.nbytes].view(getattr(torch, e.dtype)).view(e.shape)
