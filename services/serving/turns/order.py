"""The order in which owners use an engine that holds the weights of one owner at a time.

    owner A: in ── in ── last out ┐                                    ┌ waits
    owner B: waits, waits ────────┴─► load the weights of B ─► in, in ─┴ last out ─► load the weights of A ─► ...

Any number of uses by one owner run at once. While another owner waits, no further use by the current owner begins, so a
wait lasts as long as the uses in progress, and one load. If no other owner waits, no weights are loaded.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class Turns:
    """Admits the uses of one owner at a time."""

    def __init__(self, load: Callable[[str], Awaitable[None]], owner: str | None = None) -> None:
        """load(owner): loads the owner's weights; called while no use is in progress.

        owner: the owner of the weights that the engine holds now.
        """
        self._load = load
        self.owner = owner  # None: its weights are not known, or out of date
        self._users = 0
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()
        self._loading: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        """Wait for the owner's turn, and use the engine in the body. Raises what `load` raises."""
        if self.owner == owner and self._loading is None and all(admitted.done() for _, admitted in self._waiting):
            self._users += 1
        else:
            await self._admitted(owner)
        try:
            yield
        finally:
            self._users -= 1
            self._next()

    def outdated(self, owner: str) -> None:
        """Load the weights of an owner again before its next use, because they have changed."""
        if self.owner == owner:
            self.owner = None

    async def _admitted(self, owner: str) -> None:
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((owner, admitted))
        self._next()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled() and admitted.exception() is None:  # both at once
                self._users -= 1
                self._next()
            raise

    def _next(self) -> None:
        """Begin the turn of the owner that has waited longest, if no use is in progress."""
        while self._waiting and self._waiting[0][1].done():  # cancelled
            self._waiting.popleft()
        if self._users or not self._waiting or self._loading is not None:
            return
        self._loading = asyncio.create_task(self._begin(self._waiting[0][0]), name="turn of an engine")

    async def _begin(self, owner: str) -> None:
        """Load the weights of an owner if the engine has others, and admit all of its uses that wait."""
        error: Exception | None = None
        try:
            if self.owner != owner:
                self.owner = None
                await self._load(owner)
                self.owner = owner
        except Exception as failed:  # noqa: BLE001 - raised by each use that waits
            error = failed
        self._loading = None
        mine = [admitted for of, admitted in self._waiting if of == owner and not admitted.done()]
        self._waiting = deque(waits for waits in self._waiting if waits[0] != owner)
        for admitted in mine:
            if error is None:
                self._users += 1
                admitted.set_result(None)
            else:
                admitted.set_exception(error)
        self._next()
