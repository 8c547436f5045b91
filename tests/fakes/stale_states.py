"""A worker extension whose weight updates leave a part of state-space layers stale, which verification must detect.

Engines are known to lose these weights in a reload, because they keep some in another form than the files have:
A = -exp(A_log).
"""

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from sdft.actors.vllm.extension import WorkerExtension
from sdft.actors.vllm.reload import Reload
from sdft.actors.vllm.transfer import BACKEND, SnapshotTransfer

PARTS = ("A", "D", "dt_bias")


class StaleStates(Reload):
    """A reload after which the state-space layers have their old A, D and dt_bias."""

    def begin(self) -> None:
        layers = [module for module in self._model.modules() if hasattr(module, "A")]
        self._old = [(getattr(layer, name), getattr(layer, name).clone()) for layer in layers for name in PARTS]
        assert self._old, "the model has no state-space layers"
        super().begin()

    @torch.no_grad()
    def finish(self) -> None:
        super().finish()
        for weight, old in self._old:
            weight.copy_(old)


class WithStaleStates(SnapshotTransfer):
    """A snapshot transfer after which the state-space layers have their old A, D and dt_bias."""

    reload_cls = StaleStates


class Extension(WorkerExtension):
    """Loaded into the worker process instead of actors.vllm.extension.WorkerExtension."""


WeightTransferEngineFactory._registry[BACKEND] = lambda: WithStaleStates
