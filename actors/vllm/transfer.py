"""Loads weights into a vLLM worker, from shared memory or by broadcast."""

import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import xxhash
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from sdft.actors.shared.adapters import merged
from sdft.actors.shared.collective import BroadcastGroup, bucket, cut, visit, whole
from sdft.actors.shared.types import BroadcastFailed, Snapshot, SnapshotDamaged
from sdft.actors.vllm.compat import begin_reload, finish_reload, repack
from sdft.actors.vllm.process import die_with_parent, error_line, forget_names

BACKEND = "sdft"
Entry = tuple[str, str, list[int], int, int]  # name, dtype, shape, offset, bytes


@dataclass
class _InitInfo(WeightTransferInitInfo):
    """Address and rank of a broadcast group. Port 0: no group."""

    address: str = ""
    port: int = 0
    rank: int = 0
    size: int = 0
    own_address: str = ""
    timeout_s: float = 0.0


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):
    path: str = ""  # in shared memory; "": receive by broadcast
    within_s: float = 0.0
    entries: list[Entry] = field(default_factory=list)
    scale: float | None = None  # for adapters only


class SnapshotTransfer(WeightTransferEngine[_InitInfo, _UpdateInfo]):
    """Reads snapshots from shared memory, or receives them by broadcast, in the engine's worker process."""

    _group: BroadcastGroup | None = None

    init_info_cls = _InitInfo
    update_info_cls = _UpdateInfo

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        if init_info.port:
            self.shutdown()
            i = init_info
            store = visit(i.address, i.port, i.timeout_s)
            self._group = BroadcastGroup(store, i.rank, i.size, self.device, i.own_address, i.timeout_s)
            return
        die_with_parent()  # a fork has already called it at its start; a spawned process (on GPUs) has not
        forget_names()

    def start_weight_update(self) -> None:
        begin_reload(self.model)

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        try:
            if update_info.path:
                with open(update_info.path, "rb") as file:
                    tensors = _tensors(mapped(file), update_info.entries)
            else:
                tensors = self._received(update_info.entries, time.monotonic() + update_info.within_s)
            if update_info.scale is not None:
                base, dtype = Path(self.model_config.model), self.model_config.dtype
                tensors = merged(base, dict(tensors), update_info.scale, dtype)
            self.model.load_weights(tensors)
        except Exception as error:  # any error: the other members of the group must not wait for this engine
            self.shutdown()
            finish_reload(self.model, self.model_config)  # otherwise the next update cannot begin
            raise RuntimeError(error_line(error)) from error  # vLLM forwards the text only

    def _received(self, entries: Sequence[Entry], deadline: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors as they arrive, bucket by bucket. Raises BroadcastFailed if one is missing or damaged."""
        if self._group is None:
            raise BroadcastFailed("this engine is in no broadcast group")
        for part in cut([nbytes for *_, nbytes in entries]):
            in_bucket = [entries[i] for i in part]
            start = in_bucket[0][3]
            end = in_bucket[-1][3] + in_bucket[-1][4]
            full = bucket(end - start, self.device)  # not reused: vLLM keeps views of it
            self._group.broadcast(full, deadline)
            if not whole(full):
                raise BroadcastFailed(
                    f"{in_bucket[0][0]} or one of the {len(in_bucket) - 1} tensors after it arrived damaged"
                )
            for name, dtype, shape, offset, nbytes in in_bucket:
                yield name, full[offset - start :][:nbytes].view(getattr(torch, dtype)).view(shape)

    def finish_weight_update(self) -> None:
        finish_reload(self.model, self.model_config)
        self.refresh_head()

    def refresh_head(self) -> None:
        """Repack the lm_head.

        With tied embeddings the CPU backend keeps a repacked copy of it that an update does not reach. Without a repack
        the hidden states are exact and the logits silently stale.
        """
        head = getattr(self.model, "lm_head", None)
        if head is not None:
            repack(head)

    def shutdown(self) -> None:
        """Leave the group. No other resource is held between updates."""
        group, self._group = self._group, None
        if group is not None:
            group.close()


def mapped(file: BinaryIO) -> memoryview:
    """A snapshot's payload, read-only."""
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def check_digests(snapshot: Snapshot, file: BinaryIO) -> None:
    payload = mapped(file)
    for t in snapshot.tensors:
        if xxhash.xxh3_128_hexdigest(payload[t.offset : t.offset + t.nbytes]) != t.digest:
            what = f"{snapshot.role} weights v{snapshot.version}: {t.name}"
            raise SnapshotDamaged(f"{what} arrived damaged: its digest is not the learner's")


def _tensors(payload: memoryview, entries: Sequence[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, dtype, shape, offset, _ in entries:
        count = int(np.prod(shape))
        yield name, torch.frombuffer(payload, dtype=getattr(torch, dtype), count=count, offset=offset).view(shape)


WeightTransferEngineFactory.register_engine(BACKEND, SnapshotTransfer)
