"""A worker extension whose weight updates leave the decays of state-space layers stale, which verification must detect.

Engines are known to lose them in a reload, because they are kept in another form than in the files: A = -exp(A_log).
"""

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from sdft.actors.vllm.extension import WorkerExtension
from sdft.actors.vllm.reload import Reload
from sdft.actors.vllm.transfer import BACKEND, SnapshotTransfer


class StaleStates(Reload):
    """A reload after which the state-space layers have their old decays."""

    def begin(self) -> None:
        self._old = [(module, module.A.clone()) for module in self._model.modules() if hasattr(module, "A")]
        assert self._old, "the model has no state-space layers"
        super().begin()

    @torch.no_grad()
    def finish(self) -> None:
        super().finish()
        for module, decays in self._old:
            module.A.copy_(decays)


class WithStaleStates(SnapshotTransfer):
    """A snapshot transfer after which the state-space layers have their old decays."""

    reload_cls = StaleStates


class Extension(WorkerExtension):
    """Loaded into the worker process instead of actors.vllm.extension.WorkerExtension."""


WeightTransferEngineFactory._registry[BACKEND] = lambda: WithStaleStates
