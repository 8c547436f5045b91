"""Weights by broadcast: the learner sends a snapshot to all engines of a role at once, by NCCL on GPUs, gloo on CPUs.

    engines that serve ─► the same as last time? else form a group ─► learner sends, every engine receives and verifies
                                                                  └─► fallback: load the snapshot from shared memory

A broadcast only saves time. Engines that the broadcast misses, or reaches incompletely, fall back to loading the
snapshot from shared memory, as late joiners do. The driver does not import torch: the ends import it when they connect.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayError

from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import (
    LearnerLost,
    NotReceived,
    Process,
    Rendezvous,
    Snapshot,
    TensorEntry,
    UpdateReport,
)
from sdft.actors.shared.waiting import all_of, cancelled, within
from sdft.actors.transport.memory import MemoryTransport
from sdft.actors.transport.protocol import Destination, Learner, Sender, Stream

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from sdft.actors.shared.collective import BroadcastGroup

JOIN_S = 30.0  # limit for all members to form a group
MEET_S = 60.0  # limit for the learner to find a port
SLOW_S = 5.0  # a failure after longer than this is slow
TRIES = 3  # slow failures in a row that end broadcasts; quick ones, as after an engine's death, cost nothing
Failure = (RayError, TimeoutError, NotReceived, LearnerLost)


class BroadcastSender(Sender):
    """The learner's end. One group per role, formed anew whenever its members change."""

    def __init__(self, device: str, address: str) -> None:
        """address: the address of this machine."""
        self._device, self._address = device, address
        self._offered: dict[str, tuple[NDArray[np.uint8], Sequence[TensorEntry]]] = {}
        self._stores: dict[str, TCPStore] = {}
        self._groups: dict[str, BroadcastGroup] = {}

    def offer(self, snapshot: Snapshot, payload: NDArray[np.uint8]) -> Snapshot:
        """Keep the bytes in view for `send`. The snapshot itself names their memory, for the fallback."""
        self._offered[snapshot.role] = payload, snapshot.tensors
        return snapshot

    def meet(self, role: str) -> tuple[str, int]:
        """Return address and port at which the role's next group meets, and close its last group."""
        from sdft.actors.shared.collective import host

        self.close(role)
        self._stores[role], port = host(self._address)
        return self._address, port

    def join(self, role: str, size: int, timeout_s: float) -> None:
        """Wait for the other members; `size` includes the learner. Raises RuntimeError if they do not join."""
        from sdft.actors.shared.collective import BroadcastGroup

        store = self._stores.pop(role)
        self._groups[role] = BroadcastGroup(store, 0, size, self._device, self._address, timeout_s)

    def send(self, role: str, timeout_s: float) -> None:
        """Send the bytes of the snapshot that was offered. Raises NotReceived if not all members received them.

        Raises SnapshotDamaged if the bytes are not those that were packed. Either error closes the group.
        """
        try:
            self._groups[role].send(*self._offered[role], time.monotonic() + timeout_s)
        except BaseException:
            self.close(role)
            raise

    def close(self, role: str) -> None:
        """Close the role's group, if there is one. Its members detect that."""
        group = self._groups.pop(role, None)
        if group is not None:
            group.close()


class BroadcastStream(Stream):
    """An engine's end of a group."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._group: BroadcastGroup | None = None
        self._receive_s = 0.0

    def connect(self, place: Mapping[str, Any], own_address: str) -> None:
        """Join a group, and leave the previous one. place: the fields of a Rendezvous."""
        from sdft.actors.shared.collective import BroadcastGroup, visit

        self.close()
        p = Rendezvous(**place)
        store = visit(p.address, p.port, p.timeout_s)
        self._group = BroadcastGroup(store, p.rank, p.size, self._device, own_address, p.timeout_s)
        self._receive_s = p.receive_s

    def tensors(self, entries: Sequence[TensorEntry]) -> Iterator[tuple[str, Any]]:
        """Yield the tensors as they arrive, bucket by bucket. Raises NotReceived if one is missing or damaged."""
        if self._group is None:
            raise NotReceived("this engine is in no broadcast group")
        return self._group.receive(entries, time.monotonic() + self._receive_s)

    def close(self) -> None:
        """Leave the group."""
        group, self._group = self._group, None
        if group is not None:
            group.close()


@dataclass
class _Group:
    """The engine processes that form a group with a learner."""

    learner: Learner
    processes: tuple[Process, ...]
    failure: str = ""  # why a broadcast did not reach all of them


class BroadcastTransport(MemoryTransport):
    """Sends snapshots to all engines of a role at once; the fallback is shared memory."""

    def __init__(self, role: str, learner: Callable[[], Learner], notice: Callable[[str], None]) -> None:
        super().__init__(role, learner, notice)
        self._group: _Group | None = None  # the last one, if its last broadcast has reached all members
        self._receiving: _Group | None = None  # the one of the broadcast in progress
        self._slow_failures = 0  # in a row

    @staticmethod
    def sender(device: str, address: str) -> BroadcastSender:
        """Return the learner's end."""
        return BroadcastSender(device, address)

    @staticmethod
    def stream(device: Any) -> BroadcastStream:
        """Return an engine's end."""
        return BroadcastStream(device)

    @asynccontextmanager
    async def sending(
        self, snapshot: Snapshot, engines: Sequence[Destination], timeout_s: float
    ) -> AsyncIterator[None]:
        """Broadcast the snapshot to these engines. Without a group they load it from memory."""
        async with super().sending(snapshot, engines, timeout_s):
            group = None
            if engines and self._slow_failures < TRIES:
                group = await self._form_group(engines, timeout_s)
            if group is None:
                yield
                return
            self._group = None  # until the broadcast has reached all of them
            since = time.monotonic()
            # Half of the limit, so that engines that receive nothing have time for the fallback.
            what = f"the learner to broadcast {self.role} weights"
            sending = asyncio.ensure_future(group.learner.sender("send", timeout_s, what, self.role, timeout_s / 2))
            self._receiving = group
            try:
                yield
                try:
                    await sending
                except Failure as error:
                    group.failure = reason(error)
                    self._failed(f"failed: {group.failure}", since)
                else:
                    if group.failure:
                        self._failed(f"was incomplete: {group.failure}", since)
            finally:
                self._receiving = None
                await cancelled([sending])  # still running if the block raises or the run ends
            if not group.failure:
                self._group = group
                self._slow_failures = 0

    async def deliver(self, snapshot: Snapshot, engine: Destination, timeout_s: float) -> UpdateReport:
        """Let an engine receive the broadcast in progress, or load the snapshot from memory if it is in no group."""
        group = self._receiving
        if group is None or engine.process not in group.processes:
            return await super().deliver(snapshot, engine, timeout_s)
        what = f"{engine.name} to receive {snapshot.role} weights v{snapshot.version}"
        try:
            work = engine.call("update_weights", replace(snapshot, path=""))
            report: UpdateReport = await within(work, timeout_s, what)
        except NotReceived as error:
            group.failure = group.failure or reason(error)
            return await super().deliver(snapshot, engine, timeout_s)
        return report

    async def _form_group(self, engines: Sequence[Destination], timeout_s: float) -> _Group | None:
        learner, processes = self.learner(), tuple(engine.process for engine in engines)
        last, limit_s = self._group, min(JOIN_S, timeout_s / 2)
        if last is not None and last.learner is learner and last.processes == processes:
            return last
        self._group, size, since = None, len(processes) + 1, time.monotonic()
        what = f"the learner and {len(processes)} {self.role} engines to meet for broadcasts"
        try:
            address, port = await learner.sender("meet", MEET_S, "the learner to find a port", self.role)
            join = learner.sender("join", 2 * limit_s, what, self.role, size, limit_s)
            places = [Rendezvous(address, port, rank, size, limit_s, timeout_s / 2) for rank in range(1, size)]
            joining = [_join(engine, place) for engine, place in zip(engines, places, strict=True)]
            await within(all_of([join, *joining]), 2 * limit_s, what)
        except Failure as error:
            self._failed(f"failed, because no group formed: {reason(error)}", since)
            return None
        self._group = _Group(learner, processes)
        return self._group

    def _failed(self, how: str, since: float) -> None:
        then = ""
        if time.monotonic() - since > SLOW_S:
            self._slow_failures += 1
            then = "; no further broadcast is tried" if self._slow_failures == TRIES else ""
        self.notice(f"the broadcast of {self.role} weights {how}; the engines load them from memory{then}")


async def _join(engine: Destination, place: Rendezvous) -> None:
    try:
        await engine.call("connect", asdict(place))
    except RayActorError as error:
        raise NotReceived(f"{engine.name} is lost") from error
