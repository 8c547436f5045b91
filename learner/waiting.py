"""Waiting for remote work: every wait has a limit, and says what it waited for when that passes."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

T = TypeVar("T")


async def within(work: Awaitable[T], seconds: float, what: str) -> T:
    """The result of `work`, or TimeoutError naming `what`."""
    try:
        return await asyncio.wait_for(_plain(work), seconds)
    except TimeoutError as error:
        raise TimeoutError(f"waited {seconds:g} s for {what}") from error


async def all_within(work: Sequence[Awaitable[T]], seconds: float, what: str) -> list[T]:
    """All results, in order, or TimeoutError naming `what`."""
    return await within(all_of(work), seconds, what)


async def all_of(work: Sequence[Awaitable[T]]) -> list[T]:
    """All results, in order. The first failure is raised at once: its siblings may wait for the failed one for ever."""
    tasks = [asyncio.ensure_future(_plain(w)) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _plain(work: Awaitable[T]) -> T:
    """Ray's object references can be awaited but are no coroutines, which asyncio's own helpers ask for."""
    return await work
