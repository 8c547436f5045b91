"""The transport `ipc` on a CPU: the learner packs as on a GPU, and no process can open the handle."""

from dataclasses import replace
from typing import TYPE_CHECKING

from sdft.actors.shared.types import Snapshot
from sdft.actors.transport.ipc import IpcSender, IpcTransport

if TYPE_CHECKING:
    import torch


class KeptSender(IpcSender):
    """Shares nothing, because only GPU memory can be shared."""

    def offer(self, snapshot: Snapshot, payload: "torch.Tensor") -> Snapshot:
        """Return the snapshot with a handle that says how many bytes the buffer has."""
        self._versions[snapshot.role] = snapshot.version
        return replace(snapshot, handle=(payload.nbytes,))


class KeptTransport(IpcTransport):
    """Named in the settings of a learner."""

    @staticmethod
    def sender(device: str, address: str) -> KeptSender:
        """Return the learner's end."""
        return KeptSender()
