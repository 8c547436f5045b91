"""Loads weights into a vLLM worker: from a file that is mapped, from GPU memory, or from the transport's stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from sdft.actors.shared.adapters import merged
from sdft.actors.shared.packed import unpack
from sdft.actors.shared.pinned import PinnedFile, mapped
from sdft.actors.shared.process import die_with_parent
from sdft.actors.shared.types import TensorEntry
from sdft.actors.transport.ipc import opened
from sdft.actors.transport.named import transport_class
from sdft.actors.transport.protocol import Stream
from sdft.actors.vllm.process import error_line, forget_names
from sdft.actors.vllm.reload import Reload

BACKEND = "sdft"


@dataclass
class _InitInfo(WeightTransferInitInfo):
    """The transport's name at the start; later the place to connect to."""

    transport: str = ""
    place: dict[str, Any] = field(default_factory=dict)
    own_address: str = ""


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):
    path: str = ""  # of the file
    handle: list[Any] = field(default_factory=list)  # of GPU memory; without both the weights are streamed
    entries: list[Any] = field(default_factory=list)  # the fields of each TensorEntry
    scale: float | None = None  # for adapters only
    base: str = ""  # of adapters, as in Snapshot


class SnapshotTransfer(WeightTransferEngine[_InitInfo, _UpdateInfo]):
    """Maps or opens snapshots, or receives their stream, in the engine's worker process."""

    _stream: Stream | None = None
    _opened: torch.Tensor | None = None  # the learner's GPU memory, from which weights are being copied
    reload_cls = Reload

    init_info_cls = _InitInfo
    update_info_cls = _UpdateInfo

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        if init_info.transport:
            self._stream = transport_class(init_info.transport).stream(self.device)
            die_with_parent()  # a fork has already called it at its start; a spawned process (on GPUs) has not
            forget_names()
        else:
            self._streaming().connect(init_info.place, init_info.own_address)

    def _streaming(self) -> Stream:
        if self._stream is None:
            raise RuntimeError("this transport has no stream")
        return self._stream

    def start_weight_update(self) -> None:
        self._reload.begin()

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        try:
            tensors = self._tensors(update_info, sent(update_info.entries))
            if update_info.scale is not None:
                base, dtype = Path(update_info.base or self.model_config.model), self.model_config.dtype
                tensors = merged(base, dict(tensors), update_info.scale, dtype)
            self._reload.load(tensors)
        except Exception as error:  # any error: the other members of a group must not wait for this engine
            self.shutdown()
            self.finish_weight_update()  # otherwise the next update cannot begin
            raise RuntimeError(error_line(error)) from error  # vLLM forwards the text only

    def _tensors(self, info: _UpdateInfo, entries: Sequence[TensorEntry]) -> Iterator[tuple[str, torch.Tensor]]:
        if info.path:
            with open(info.path, "rb") as file:
                payload = self._pinned.map(file) if self.device.type == "cuda" else mapped(file)
            return unpack(torch.frombuffer(payload, dtype=torch.uint8), entries)
        if info.handle:
            self._opened = opened(tuple(info.handle), self.device)
            return unpack(self._opened, entries)
        return self._streaming().tensors(entries)

    def finish_weight_update(self) -> None:
        self._reload.finish()
        if self._opened is not None:
            torch.cuda.synchronize(self.device)  # copies are in progress, and the learner may then overwrite the memory
            self._opened = None

    @cached_property
    def _reload(self) -> Reload:
        return self.reload_cls(self.model, self.model_config)

    @cached_property
    def _pinned(self) -> PinnedFile:
        return PinnedFile()

    def shutdown(self) -> None:
        """Close the stream. Between updates only a pinned file is held beside it, for the next version."""
        if self._stream is not None:
            self._stream.close()


def sent(entries: Sequence[Any]) -> list[TensorEntry]:
    """Return the entries of a snapshot whose fields were sent as lists."""
    return [TensorEntry(name, dtype, tuple(shape), *rest) for name, dtype, shape, *rest in entries]


WeightTransferEngineFactory.register_engine(BACKEND, SnapshotTransfer)
