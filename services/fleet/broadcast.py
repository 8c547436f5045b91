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
from sdft.services.fleet.engine import EngineLost, Group, SupervisedEngine

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
        self._group: Group | None = None
        self._slow_failures = 0  # in a row

    @asynccontextmanager
    async def to(self, engines: Sequence[SupervisedEngine], timeout_s: float) -> AsyncIterator[Group | None]:
        """Send the role's last snapshot to these engines; they must receive it inside the `async with` block.

        Yields the group; None if there is none, and the engines load the snapshot from memory.
        """
        group = None
        if engines and self._slow_failures < TRIES:
            group = await self._formed(engines, min(JOIN_S, timeout_s / 2))
        if group is None:
            yield None
            return
        self._group = None  # until the broadcast has reached all members
        since = time.monotonic()
        # Half of the limit, so that engines that receive nothing have time for the fallback.
        work = self._learner().send(self._role, timeout_s / 2)
        sending = asyncio.ensure_future(within(work, timeout_s, f"the learner to broadcast {self._role} weights"))
        try:
            yield group
            try:
                await sending
            except Failure as error:
                group.broken = reason(error)
                self._failed(f"was broken off: {group.broken}", since)
            else:
                if group.broken:
                    self._failed(f"did not reach all engines whole ({group.broken})", since)
        finally:
            await cancelled([sending])  # still running if the block raises or the run ends
        if not group.broken:
            self._group = group
            self._slow_failures = 0

    async def _formed(self, engines: Sequence[SupervisedEngine], limit_s: float) -> Group | None:
        sender, members = self._learner(), tuple(engine.process for engine in engines)
        group = self._group
        if group is not None and group.sender is sender and group.members == members:
            return group
        self._group, size, since = None, len(members) + 1, time.monotonic()
        what = f"the learner and {len(members)} {self._role} engines to meet for broadcasts"
        try:
            address, port = await sender.meet(self._role)
            places = [Rendezvous(address, port, rank, size, limit_s) for rank in range(1, size)]
            joining = [engine.attempt("join", place) for engine, place in zip(engines, places, strict=True)]
            await within(all_of([sender.join(self._role, size, limit_s), *joining]), 2 * limit_s, what)
        except Failure as error:
            why = f"{error} is lost" if isinstance(error, EngineLost) else reason(error)
            self._failed(f"has no group: {why}", since)
            return None
        self._group = Group(sender, members)
        return self._group

    def _failed(self, how: str, since: float) -> None:
        then = ""
        if time.monotonic() - since > SLOW_S:
            self._slow_failures += 1
            then = "; no more is tried" if self._slow_failures == TRIES else ""
        self._notice(f"the broadcast of {self._role} weights {how}; they are loaded from memory{then}")
