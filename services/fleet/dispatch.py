"""Least-loaded dispatch with a per-worker limit; FIFO queue when all workers are full.

    worker = await slots.take() ── work ── slots.give_back(worker)

Workers are only keys: Slots neither starts, calls nor stops them. Cost per item: logarithmic in the number of workers.
"""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

W = TypeVar("W", bound=Hashable)


class Slots(Generic[W]):
    """Assigns items to workers; each worker has at most `room` items at once. `clock` returns seconds."""

    def __init__(self, room: int, clock: Callable[[], float]) -> None:
        self._room, self._clock = room, clock
        self._members: set[W] = set()
        self._load: dict[W, int] = {}  # items in flight, including those of workers that have left
        self._free: list[tuple[int, int, W]] = []  # a heap by load; `_next` skips stale entries
        self._number = itertools.count()
        self._waiting: deque[asyncio.Future[W]] = deque()
        self._idle: dict[W, asyncio.Event] = {}
        self._error: Exception | None = None
        self._used = self._offered = 0.0  # slot seconds since the last call of `busy`
        self._since = clock()
        self._taken = 0

    def join(self, worker: W) -> None:
        """Add a worker; it takes items at once."""
        self._meter()
        self._members.add(worker)
        self._offer(worker)
        self._serve()

    def leave(self, worker: W) -> None:
        """Remove a worker: it takes no more items, and its items in flight continue."""
        self._meter()
        self._members.discard(worker)

    async def idle(self, worker: W) -> None:
        """Return when a worker that has left has no item in flight."""
        if self._load.get(worker):
            await self._idle.setdefault(worker, asyncio.Event()).wait()

    async def take(self) -> W:
        """Return a worker for one item, once one has room. Raises the error given to `fail`."""
        if self._error is not None:
            raise self._error
        if not self._waiting and (worker := self._next()) is not None:
            return worker
        place: asyncio.Future[W] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.give_back(place.result())
            raise

    def give_back(self, worker: W) -> None:
        """Free one slot of the worker: its item is done, or goes to another worker."""
        self._meter()
        self._load[worker] -= 1
        self._taken -= 1
        if worker in self._members:
            self._offer(worker)
            self._serve()
        elif not self._load[worker]:
            del self._load[worker]
            if (event := self._idle.pop(worker, None)) is not None:
                event.set()

    def fail(self, error: Exception) -> None:
        """Raise the error from every waiting and every later `take`: there will be no worker any more."""
        self._error = error
        for place in self._waiting:
            if not place.done():
                place.set_exception(error)
        self._waiting.clear()

    @property
    def loads(self) -> dict[W, int]:
        """Items in flight by worker, for the workers that have any."""
        return {worker: load for worker, load in self._load.items() if load}

    @property
    def queued(self) -> int:
        """Items that wait for a worker."""
        return len(self._waiting)

    def busy(self) -> float:
        """Return the share of all slots in use since the last call, 0 to 1."""
        self._meter()
        share = self._used / self._offered if self._offered else 0.0
        self._used = self._offered = 0.0
        return share

    def _meter(self) -> None:
        now = self._clock()
        passed, self._since = now - self._since, now
        self._used += passed * min(self._taken, self._room * len(self._members))
        self._offered += passed * self._room * len(self._members)

    def _offer(self, worker: W) -> None:
        load = self._load.setdefault(worker, 0)
        if len(self._free) > 8 * len(self._members) + 64:  # mostly stale entries
            self._free = [(self._load[w], next(self._number), w) for w in self._members if self._load[w] < self._room]
            heapq.heapify(self._free)
        elif load < self._room:
            heapq.heappush(self._free, (load, next(self._number), worker))

    def _next(self) -> W | None:
        """Assign an item to the least-loaded worker; None if no worker has room."""
        while self._free:
            load, _, worker = heapq.heappop(self._free)
            if worker in self._members and self._load[worker] == load:
                self._meter()
                self._load[worker] += 1
                self._taken += 1
                self._offer(worker)
                return worker
        return None

    def _serve(self) -> None:
        while self._waiting:
            if self._waiting[0].done():  # cancelled
                self._waiting.popleft()
                continue
            worker = self._next()
            if worker is None:
                return
            self._waiting.popleft().set_result(worker)
