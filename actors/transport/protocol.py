"""The protocol of a weight transport: how a version of a role's weights travels from the learner to each engine.

    learner, rank 0        driver                              each engine
    ───────────────        ──────                              ───────────
    offer ───────────────► deliver, once for each engine ────► receive ─► verify
                           │ the version is in use                          │
                           └─ released, when every engine has verified it ◄─┘

    offered ─► delivered to each engine ─► received ─► verified ─► released ─► the next version may overwrite it
       │                 │                    │           └─ wrong log-probs: the engine is replaced
       │                 │                    └─ damaged or gone: the version is offered again
       │                 └─ the engine is lost: its replacement gets the version before it serves
       └─ lost with the learner: late joiners wait for the next version

A transport is one class, which `weights.transport` names. The driver has one instance for each role. Its `sender`,
`receiver` and `stream` make the ends in the other processes. The engine verifies, whatever the transport is: the digest
of each tensor before it loads them, and the log-probs of the probe afterwards.

A late joiner gets the newest version by `deliver` alone, long after the other engines. So what `offer` has made
available stays until the next `offer`. services/fleet/versions.py says which version is in use.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Protocol

from sdft.actors.shared.types import Process, Snapshot, TensorEntry, UpdateReport
from sdft.actors.shared.waiting import within


class Sender:
    """The learner's end, in rank 0."""

    def offer(self, snapshot: Snapshot, payload: Any) -> Snapshot:
        """Make a snapshot available to the engines, and return it as they get it.

        payload: its bytes [nbytes] uint8 in the learner's memory, a numpy array; with WeightTransport.on_gpu a torch
        tensor, the same one for each version. They change when the role's next version is packed. The default returns
        the snapshot as it is: `path` names that memory.
        """
        return snapshot


class Receiver:
    """An engine's end."""

    def receive(self, snapshot: Snapshot) -> BinaryIO:
        """Return an open file with the snapshot's bytes, which has a descriptor and can be mapped.

        Runs in a thread, while the engine generates. FileNotFoundError if the snapshot is gone, as with the learner.
        """
        return open(snapshot.path, "rb")


class Stream(Protocol):
    """An end in the process that holds an engine's tensors: it receives a snapshot without a `path`, while the engine
    is paused."""

    def connect(self, place: Mapping[str, Any], own_address: str) -> None:
        """Prepare for streams. place: what the driver's `deliver` has sent. own_address: of this machine."""

    def tensors(self, entries: Sequence[TensorEntry]) -> Iterator[tuple[str, Any]]:
        """Yield name and torch tensor of each entry as it arrives. NotReceived if one is missing or damaged."""

    def close(self) -> None:
        """Free what is held, after an error too. `tensors` then needs another `connect`."""


class Learner(Protocol):
    """The learner as a transport uses it in the driver. Both calls raise LearnerLost."""

    async def payload(self, role: str) -> list[Any]:
        """Return the bytes of the role's last snapshot: a list of one reference into Ray's object store."""

    async def sender(self, method: str, seconds: float, what: str, *arguments: Any) -> Any:
        """Call a method of the sender in rank 0. TimeoutError names `what`."""


@dataclass(frozen=True)
class Destination:
    """An engine as a transport uses it in the driver."""

    name: str  # "student engine 0"
    process: Process
    call: Callable[..., Awaitable[Any]]  # call(method, *arguments); RayActorError if the engine dies


class WeightTransport:
    """The transport of one role. By itself it delivers snapshots whose `path` every engine can open."""

    on_gpu: ClassVar[bool] = False  # the learner packs snapshots on its GPU, and not in main memory

    def __init__(self, role: str, learner: Callable[[], Learner], notice: Callable[[str], None]) -> None:
        """learner(): returns the current learner. notice(text): prints a message of the run."""
        self.role, self.learner, self.notice = role, learner, notice

    @staticmethod
    def sender(device: str, address: str) -> Sender:
        """Return the learner's end. device: "cpu" or "cuda". address: of its machine."""
        return Sender()

    @staticmethod
    def receiver() -> Receiver:
        """Return an engine's end."""
        return Receiver()

    @staticmethod
    def stream(device: Any) -> Stream | None:
        """Return the end for streams, if the transport has any. device: torch's, of the engine's tensors."""
        return None

    @asynccontextmanager
    async def sending(
        self, snapshot: Snapshot, engines: Sequence[Destination], timeout_s: float
    ) -> AsyncIterator[None]:
        """Send a snapshot to all these engines at once, if the transport can; `deliver` runs inside the block."""
        yield

    async def deliver(self, snapshot: Snapshot, engine: Destination, timeout_s: float) -> UpdateReport:
        """Let an engine receive and verify the snapshot.

        Raises FileNotFoundError if the snapshot is gone, as with the learner; TimeoutError; RayActorError if the engine
        dies; and what the engine raises: SnapshotDamaged, WeightMismatch.
        """
        what = f"{engine.name} to load {snapshot.role} weights v{snapshot.version}"
        report: UpdateReport = await within(engine.call("update_weights", snapshot), timeout_s, what)
        return report

    def vacated(self, node: str) -> None:
        """Free what is held on a node: its last engine has left."""

    def stop(self) -> None:
        """Free what is held in other processes."""
