"""Broadcasts weights from the learner to all engines of a role at once: NCCL on GPUs, gloo on CPUs.

    engines that serve ─► the same as last time? else form a group ─► learner sends, every engine receives and verifies
                                                                  └─► fallback: load the snapshot from shared memory

A broadcast only saves time. Engines that the broadcast misses, or reaches incompletely, fall back to loading the
snapshot from shared memory, as late joiners do.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from ray.exceptions import RayError

from sdft.actors.shared.types import Rendezvous
from sdft.actors.shared.waiting import all_of, cancelled, within
from sdft.learner.group import LearnerLost
from sdft.services.base.failures import reason
from sdft.services.fleet.engine import EngineLost, Receivers, SupervisedEngine

JOIN_S = 30.0  # limit for all members to form a group
SLOW_S = 5.0  # a failure after longer than this is slow
TRIES = 3  # slow failures in a row that end broadcasts; quick ones, as after an engine's death, cost nothing
Failure = (RayError, TimeoutError, EngineLost, LearnerLost)


class Sender(Protocol):
    """The interface of the learner for broadcasts."""

    async def meet(self, role: str) -> tuple[str, int]:
        """Return the address and port where the role's next group forms."""

    async def join(self, role: str, size: int, timeout_s: float) -> None:
        """Join the role's group of `size` members; return when all have joined."""

    async def send(self, role: str, timeout_s: float) -> None:
        """Send the role's last snapshot to all members."""


class Broadcast:
    """The broadcasts of one role."""

    def __init__(self, role: str, learner: Callable[[], Sender], notice: Callable[[str], None]) -> None:
        """learner(): returns the current learner. notice(text): a broadcast failed."""
        self._role, self._learner, self._notice = role, learner, notice
        self._receivers: Receivers | None = None
        self._slow_failures = 0  # in a row

    @asynccontextmanager
    async def send_to(self, engines: Sequence[SupervisedEngine], timeout_s: float) -> AsyncIterator[Receivers | None]:
        """Send the role's last snapshot to these engines; they must receive it inside the `async with` block.

        Yields the engines in the group; None if there is no group, and the engines load the snapshot from memory.
        """
        receivers = None
        if engines and self._slow_failures < TRIES:
            receivers = await self._form_group(engines, min(JOIN_S, timeout_s / 2))
        if receivers is None:
            yield None
            return
        self._receivers = None  # until the broadcast has reached all of them
        since = time.monotonic()
        # Half of the limit, so that engines that receive nothing have time for the fallback.
        work = self._learner().send(self._role, timeout_s / 2)
        sending = asyncio.ensure_future(within(work, timeout_s, f"the learner to broadcast {self._role} weights"))
        try:
            yield receivers
            try:
                await sending
            except Failure as error:
                receivers.failure = reason(error)
                self._failed(f"failed: {receivers.failure}", since)
            else:
                if receivers.failure:
                    self._failed(f"was incomplete: {receivers.failure}", since)
        finally:
            await cancelled([sending])  # still running if the block raises or the run ends
        if not receivers.failure:
            self._receivers = receivers
            self._slow_failures = 0

    async def _form_group(self, engines: Sequence[SupervisedEngine], limit_s: float) -> Receivers | None:
        sender, processes = self._learner(), tuple(engine.process for engine in engines)
        last = self._receivers
        if last is not None and last.sender is sender and last.processes == processes:
            return last
        self._receivers, size, since = None, len(processes) + 1, time.monotonic()
        what = f"the learner and {len(processes)} {self._role} engines to meet for broadcasts"
        try:
            address, port = await sender.meet(self._role)
            places = [Rendezvous(address, port, rank, size, limit_s) for rank in range(1, size)]
            joining = [engine.attempt("join", place) for engine, place in zip(engines, places, strict=True)]
            await within(all_of([sender.join(self._role, size, limit_s), *joining]), 2 * limit_s, what)
        except Failure as error:
            why = f"{error} is lost" if isinstance(error, EngineLost) else reason(error)
            self._failed(f"failed, because no group formed: {why}", since)
            return None
        self._receivers = Receivers(sender, processes)
        return self._receivers

    def _failed(self, how: str, since: float) -> None:
        then = ""
        if time.monotonic() - since > SLOW_S:
            self._slow_failures += 1
            then = "; no further broadcast is tried" if self._slow_failures == TRIES else ""
        self._notice(f"the broadcast of {self._role} weights {how}; the engines load them from memory{then}")
