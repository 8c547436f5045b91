"""A worker extension whose weight updates leave the repacked copy of lm_head stale, which verification must detect."""

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from sdft.actors.vllm.extension import WorkerExtension
from sdft.actors.vllm.reload import Reload
from sdft.actors.vllm.transfer import BACKEND, SnapshotTransfer


class StaleHead(Reload):
    """A reload without the repacking."""

    def refresh_head(self) -> None:
        """Do nothing, on purpose."""


class WithoutRefresh(SnapshotTransfer):
    """A snapshot transfer without the repacking."""

    reload_cls = StaleHead


class Extension(WorkerExtension):
    """Loaded into the worker process instead of actors.vllm.extension.WorkerExtension."""


WeightTransferEngineFactory._registry[BACKEND] = lambda: WithoutRefresh
