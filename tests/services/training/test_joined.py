"""Calls of groups are joined in rounds that depend on the groups alone."""

import asyncio
import random
from typing import Any

import pytest

from sdft.services.training.joined import Joined


def rounds_of(order: list[int], calls_of: list[list[str]]) -> list[tuple[str, list[Any]]]:
    """Run groups, started in `order`, of which each makes its calls one after the other. Returns the engine calls."""
    made: list[tuple[str, list[Any]]] = []

    async def engines(kind: str, items: list[Any]) -> list[Any]:
        made.append((kind, items))
        await asyncio.sleep(0)
        return [f"{kind} of {item}" for item in items]

    async def run() -> None:
        joined: Joined[str] = Joined(len(calls_of), engines)

        async def group(number: int) -> None:
            for kind in calls_of[number]:
                for _ in range(random.randrange(4)):
                    await asyncio.sleep(0)
                assert await joined.call(number, kind, [number, -number]) == [
                    f"{kind} of {number}",
                    f"{kind} of {-number}",
                ]
            joined.done()

        await asyncio.gather(*(group(number) for number in order))

    asyncio.run(run())
    return made


def test_each_round_is_one_call_of_the_engines_whatever_the_order() -> None:
    calls = [["sample", "score"], ["sample", "sample", "score"], [], ["score"]]
    expected = [
        ("sample", [0, 0, 1, -1]),
        ("score", [3, -3]),
        ("score", [0, 0]),
        ("sample", [1, -1]),
        ("score", [1, -1]),
    ]
    for seed in range(20):
        random.seed(seed)
        order = random.sample(range(4), 4)
        assert rounds_of(order, calls) == expected


def test_an_error_of_the_engines_reaches_every_group_of_the_round() -> None:
    async def broken(kind: str, items: list[Any]) -> list[Any]:
        raise TimeoutError(f"no {kind}")

    async def run() -> list[Any]:
        joined: Joined[str] = Joined(2, broken)
        return await asyncio.gather(joined.call(0, "x", [1]), joined.call(1, "x", [2]), return_exceptions=True)

    assert [str(error) for error in asyncio.run(run())] == ["no x", "no x"]


def test_two_calls_of_a_group_at_once_are_an_error() -> None:
    async def run() -> None:
        joined: Joined[str] = Joined(2, lambda kind, items: asyncio.sleep(0, items))
        await asyncio.gather(joined.call(0, "x", [1]), joined.call(0, "x", [2]))

    with pytest.raises(RuntimeError, match="while an earlier call of it had not returned"):
        asyncio.run(run())
