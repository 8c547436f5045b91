"""A worker extension whose weight updates change one weight slightly.

The change is within the gap allowed between learner and engine, as with copies of experts in bfloat16.
"""

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from sdft.actors.vllm.extension import WorkerExtension
from sdft.actors.vllm.transfer import BACKEND, SnapshotTransfer


class Spoiling(SnapshotTransfer):
    """A snapshot transfer that changes one weight at the end of each update."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self.model.model.norm.weight.data.mul_(1.004)


class Extension(WorkerExtension):
    """Loaded into the worker process instead of actors.vllm.extension.WorkerExtension."""


WeightTransferEngineFactory._registry[BACKEND] = lambda: Spoiling
