"""Waiting for remote work. Each wait has a limit, is listed while it lasts, and is named in its TimeoutError."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Wait:
    """One wait in progress. `what` is a phrase such as "student engine 0 to generate 32 sequences"."""

    what: str
    since: float  # on the monotonic clock
    limit_s: float


class Waits:
    """The waits of this process and the number that have ended, for a watchdog."""

    def __init__(self) -> None:
        self.ended = 0
        self._number = itertools.count()
        self._now: dict[int, Wait] = {}

    def begin(self, what: str, limit_s: float) -> int:
        number = next(self._number)
        self._now[number] = Wait(what, time.monotonic(), limit_s)
        return number

    def end(self, number: int) -> None:
        del self._now[number]
        self.ended += 1

    @property
    def now(self) -> list[Wait]:
        """The waits in progress, the oldest first."""
        return list(self._now.values())


WAITS = Waits()


async def within(work: Awaitable[T], seconds: float, what: str) -> T:
    """The result of `work`. Raises TimeoutError naming `what` after `seconds`."""
    number = WAITS.begin(what, seconds)
    try:
        async with asyncio.timeout(seconds) as limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():
            raise  # from an inner wait, which has already named what it waited for
        raise TimeoutError(f"waited {seconds:g} s for {what}") from error
    finally:
        WAITS.end(number)


async def all_within(work: Sequence[Awaitable[T]], seconds: float, what: str) -> list[T]:
    """All results, in order. Raises TimeoutError naming `what` after `seconds`."""
    return await within(all_of(work), seconds, what)


async def all_of(work: Sequence[Awaitable[T]]) -> list[T]:
    """All results, in order. Raises the first failure at once: the others may wait for the failed one for ever."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def unless(failure: Awaitable[object], work: Awaitable[T]) -> T:
    """The result of `work`. If `failure` ends first, which it does by raising, raise its error and cancel `work`."""
    first, second = asyncio.ensure_future(failure), asyncio.ensure_future(work)
    try:
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        if not second.done():
            await first
        return await second
    finally:
        await cancelled([first, second])


async def cancelled(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def silent_for(answer: Awaitable[object], seconds: float) -> bool:
    """Whether `answer`, which a responsive process completes at once, is not complete within `seconds`."""
    try:
        async with asyncio.timeout(seconds):  # wait_for may lose a cancellation that comes with the answer (bpo-37658)
            await answer
    except TimeoutError:
        return True
    return False
