"""Joins the engine calls of the groups of a batch: one call of the engines for each round of calls.

    group 0: complete ┐                     ┌ score ┐
    group 1: complete ├─► one engine call ─►┤ score ├─► one engine call ─► ...
    group 2: complete ┘                     └ done  ┘

A round begins when every group that is not done waits for a call. So what the engines get depends on the groups alone,
not on the order in which they happen to run: a strict run has the same bits every time.

`lockstep` runs groups that wait for engine calls and for nothing else, without a task for each. Joined is for groups
that are tasks, which may wait for anything.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, Hashable, Iterable, Sequence
from itertools import chain, islice
from types import coroutine
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
Run = Callable[[K, list[Any]], Awaitable[list[Any]]]  # calls the engines with items; one result per item


@coroutine
def step_call(kind: K, items: Sequence[Any]) -> Generator[tuple[K, Sequence[Any]], list[Any], list[Any]]:
    """Return one result per item: the call of a group under `lockstep`, which gets it at the `yield`."""
    return (yield kind, items)


async def lockstep(groups: Sequence[Coroutine[Any, Any, T]], run: Run[K]) -> list[T]:
    """Run groups, one coroutine each, round by round. Returns what each returns, in order.

    Raises the first error of a group or a round, and RuntimeError if a group awaits anything but `step_call`.
    """
    made: dict[int, T] = {}
    going: Iterable[int] = range(len(groups))  # groups that have not returned
    answers: Sequence[list[Any] | None] = [None] * len(groups)  # of their last calls
    try:
        while answers:
            calls: dict[int, tuple[K, Sequence[Any]]] = {}
            for number, answer in zip(going, answers, strict=True):
                try:
                    call = groups[number].send(answer)
                except StopIteration as end:
                    made[number] = end.value
                    continue
                if type(call) is not tuple:
                    raise RuntimeError(f"a group awaits {call!r}, which no engine answers")
                calls[number] = call
            going, answers = calls, await _round(list(calls.values()), run)
    finally:
        for group in groups:
            group.close()
    return [made[number] for number in range(len(groups))]


class Joined(Generic[K]):
    """The calls of `groups` tasks, numbered from 0. Each has at most one call at a time."""

    def __init__(self, groups: int, run: Run[K]) -> None:
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
            self._round = asyncio.create_task(self._together(list(calls.values())))

    async def _together(self, calls: "list[tuple[K, Sequence[Any], asyncio.Future[list[Any]]]]") -> None:
        try:
            answers = await _round([(kind, items) for kind, items, _ in calls], self._run)
        except BaseException as error:
            for _, _, result in calls:
                if not result.done():
                    result.cancel() if isinstance(error, asyncio.CancelledError) else result.set_exception(error)
            if isinstance(error, asyncio.CancelledError):
                raise
        else:
            for (_, _, result), answer in zip(calls, answers, strict=True):
                if not result.done():
                    result.set_result(answer)


async def _round(calls: Sequence[tuple[K, Sequence[Any]]], run: Run[K]) -> list[list[Any]]:
    """Run the calls of a round: one kind after the other, in the order of the first group that has it."""
    of_kind: dict[K, list[Sequence[Any]]] = {}
    for kind, items in calls:
        of_kind.setdefault(kind, []).append(items)
    answers = {kind: iter(await run(kind, list(chain.from_iterable(items)))) for kind, items in of_kind.items()}
    return [list(islice(answers[kind], len(items))) for kind, items in calls]
