"""A worker extension whose weight updates leave the lm_head's repacked copy stale: what verification must catch."""

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from actors.engine import BACKEND, SnapshotTransfer, WorkerExtension


class WithoutRefresh(SnapshotTransfer):
    """Everything but the repacking."""

    def refresh_head(self) -> None:
        """Left out on purpose."""


class Extension(WorkerExtension):
    """Loaded into the worker process in place of actors.engine.WorkerExtension."""


WeightTransferEngineFactory._registry[BACKEND] = lambda: WithoutRefresh
