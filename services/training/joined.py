"""Joins the engine calls of the groups of a batch: one call of the engines for each round of calls.

    group 0: complete ┐                     ┌ score ┐
    group 1: complete ├─► one engine call ─►┤ score ├─► one engine call ─► ...
    group 2: complete ┘                     └ done  ┘

A round begins when every group that is not done waits for a call. So what the engines get depends on the groups alone,
not on the order in which they happen to run: a strict run has the same bits every time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Joined(Generic[K]):
    """The calls of `groups` groups, numbered from 0. Each group has at most one call at a time.

    run(kind, items): calls the engines with the items of all groups and returns one result per item.
    """

    def __init__(self, groups: int, run: Callable[[K, list[Any]], Awaitable[list[Any]]]) -> None:
        self._active, self._run = groups, run
        self._waiting: dict[int, tuple[K, Sequence[Any], asyncio.Future[list[Any]]]] = {}
        self._round: asyncio.Task[None] | None = None

    async def call(self, group: int, kind: K, items: Sequence[Any]) -> list[Any]:
        """Return the results of one group's items, once the round has ended. Raises the round's error."""
        if group in self._waiting:
            raise RuntimeError("an algorithm called the engines while an earlier call of it had not returned")
        result: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting[group] = kind, items, result
        self._begin_round()
        return await result

    def done(self) -> None:
        """Note that a group makes no more calls."""
        self._active -= 1
        self._begin_round()

    def cancel(self) -> None:
        """Cancel the round in progress."""
        if self._round is not None:
            self._round.cancel()

    def _begin_round(self) -> None:
        if self._waiting and len(self._waiting) == self._active:
            calls, self._waiting = dict(sorted(self._waiting.items())), {}
            self._round = asyncio.create_task(self._together(calls))

    async def _together(self, calls: "dict[int, tuple[K, Sequence[Any], asyncio.Future[list[Any]]]]") -> None:
        """Run the calls of a round: one kind after the other, in the order of the first group that has it."""
        try:
            for kind in dict.fromkeys(kind for kind, _, _ in calls.values()):
                of_kind = [(items, result) for other, items, result in calls.values() if other == kind]
                results = iter(await self._run(kind, [item for items, _ in of_kind for item in items]))
                for items, result in of_kind:
                    its = list(islice(results, len(items)))
                    if not result.done():
                        result.set_result(its)
        except BaseException as error:
            for _, _, result in calls.values():
                if not result.done():
                    result.cancel() if isinstance(error, asyncio.CancelledError) else result.set_exception(error)
            if isinstance(error, asyncio.CancelledError):
                raise
