"""The weight versions of one role: which is the newest, whether it is in use, and which the engines have verified.

    offering ──► newest, in use ──► verified ──► released      training/weight_sync.py: every engine loads it
                      │  ▲
                      │  └── loading, in use again             fleet/engine.py: a late joiner or a replacement loads it
                      └────► lost with the learner: `loading` waits for the next version

The learner packs each version into the memory of the one before. So only one block of `offering` or `loading` runs at a
time, and a version that is in use is not overwritten.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from sdft.actors.shared.types import Snapshot


class Versions:
    """The versions of one role's weights."""

    def __init__(self) -> None:
        self.newest: Snapshot | None = None  # None: engines serve the model that they started with
        self.timeout_s = 0.0  # limit for an engine to load the newest
        self.verified = -1  # newest version on all engines but those being replaced; -1: none of the current learner
        self._using = asyncio.Lock()
        self._readable = asyncio.Event()
        self._readable.set()

    @property
    def in_use(self) -> bool:
        """Whether a version is being offered, or an engine loads one."""
        return self._using.locked()

    @asynccontextmanager
    async def offering(self, offer: Callable[[], Awaitable[Snapshot]], timeout_s: float) -> AsyncIterator[Snapshot]:
        """Offer the next version; it is in use until the block ends. timeout_s: limit for an engine to load it."""
        async with self._using:
            snapshot = await offer()
            self.newest, self.timeout_s = snapshot, timeout_s
            self._readable.set()
            yield snapshot

    @asynccontextmanager
    async def loading(self) -> AsyncIterator[Snapshot | None]:
        """Yield the newest version; it is in use until the block ends. If it was lost, wait for the next."""
        await self._readable.wait()
        async with self._using:
            yield self.newest

    def mark_lost(self) -> None:
        """Let `loading` wait for the next version, because the newest was lost with the learner.

        Without any version, as of an external teacher, the engines keep what they have loaded.
        """
        if self.newest is not None:
            self._readable.clear()
