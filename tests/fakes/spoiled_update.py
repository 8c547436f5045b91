"""A worker extension whose weight updates spoil a weight a little: by less than the gap that learner and engine may
have, as copies of experts in bfloat16 do."""

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from sdft.actors.vllm.extension import WorkerExtension
from sdft.actors.vllm.transfer import BACKEND, SnapshotTransfer


class Spoiling(SnapshotTransfer):
    """Everything, and then one weight is changed."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self.model.model.norm.weight.data.mul_(1.004)


class Extension(WorkerExtension):
    """Loaded into the worker process in place of actors.engine.WorkerExtension."""


WeightTransferEngineFactory._registry[BACKEND] = lambda: Spoiling
