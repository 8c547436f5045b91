"""A worker extension whose weight updates leave the lm_head's repacked copy stale: what verification must catch."""

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from sdft.actors.vllm.extension import WorkerExtension
from sdft.actors.vllm.transfer import BACKEND, SnapshotTransfer


class WithoutRefresh(SnapshotTransfer):
    """Everything but the repacking."""

    def refresh_head(self) -> None:
        """Left out on purpose."""


class Extension(WorkerExtension):
    """Loaded into the worker process in place of actors.engine.WorkerExtension."""


WeightTransferEngineFactory._registry[BACKEND] = lambda: WithoutRefresh
