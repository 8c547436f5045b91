"""Weights on the learner's GPU: engines of its node open that memory (CUDA IPC) and copy from card to card.

    on the learner's node   the learner's GPU memory ─► opened by each engine
    on another node         the learner's GPU memory ─► Ray's object store ─► a relay, as with `memory`

The learner keeps one buffer for each role and packs each version into it. An engine opens it for as long as it checks
the digests, and again for as long as it loads the tensors. Late joiners do the same: the version stays until the next
one is packed. A copy in main memory is made only if an engine on another node needs it. The driver does not import
torch.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import Handle, LearnerLost, NotReceived, Snapshot, UpdateReport
from sdft.actors.transport.memory import MemoryTransport
from sdft.actors.transport.protocol import Destination, Sender

if TYPE_CHECKING:
    import torch

ANSWER_S = 60.0  # limit for the learner to say what it has offered


class IpcSender(Sender):
    """The learner's end."""

    def __init__(self) -> None:
        self._handles: dict[str, Handle] = {}
        self._versions: dict[str, int] = {}

    def offer(self, snapshot: Snapshot, payload: "torch.Tensor") -> Snapshot:
        """Return the snapshot with a handle of its buffer, the same one for each version of the role."""
        from sdft.actors.shared.compat import share

        if snapshot.role not in self._handles:
            self._handles[snapshot.role] = share(payload)
        self._versions[snapshot.role] = snapshot.version
        return replace(snapshot, handle=self._handles[snapshot.role])

    def offered(self, role: str) -> int | None:
        """Return the version of the role that was offered last; None: none."""
        return self._versions.get(role)


class IpcTransport(MemoryTransport):
    """Delivers snapshots by a handle to engines on the learner's node, and through memory to the others."""

    on_gpu = True

    @staticmethod
    def sender(device: str, address: str) -> IpcSender:
        """Return the learner's end."""
        return IpcSender()

    async def deliver(self, snapshot: Snapshot, engine: Destination, timeout_s: float) -> UpdateReport:
        """Let an engine load the snapshot.

        Raises NotReceived, naming the mend, if the engine cannot open the memory although the learner has it.
        """
        try:
            return await super().deliver(snapshot, engine, timeout_s)
        except NotReceived:
            what = f"the learner to say which {self.role} weights it has offered"
            try:
                offered = await self.learner().sender("offered", ANSWER_S, what, self.role)
            except LearnerLost as error:
                raise FileNotFoundError(str(error)) from error
            if offered != snapshot.version:  # of the learner before
                raise FileNotFoundError(f"the learner does not have {self.role} weights v{snapshot.version}") from None
            raise


def opened(handle: Handle, device: Any) -> "torch.Tensor":
    """Return the learner's buffer [nbytes] uint8 in the process of an engine. device: torch's, of the engine.

    Raises NotReceived with the mend.
    """
    from sdft.actors.shared import compat

    try:
        return compat.opened(handle, device)
    except RuntimeError as error:
        raise NotReceived(
            f"the engine's GPU cannot open the learner's memory ({reason(error)}); set weights.transport: broadcast, "
            f"or place both on one GPU or on GPUs that reach each other (nvidia-smi topo -p2p r)"
        ) from error
