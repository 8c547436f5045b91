"""Calls of groups are joined in rounds that depend on the groups alone."""

import asyncio
import random
from typing import Any

import pytest

from sdft.services.training.joined import Joined, lockstep, step_call


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


def lockstep_of(calls_of: list[list[str]]) -> tuple[list[tuple[str, list[Any]]], list[int]]:
    """Run groups in lockstep. Returns the engine calls, and what the groups return: their numbers."""
    made: list[tuple[str, list[Any]]] = []

    async def engines(kind: str, items: list[Any]) -> list[Any]:
        made.append((kind, items))
        await asyncio.sleep(0)
        return [f"{kind} of {item}" for item in items]

    async def group(number: int) -> int:
        for kind in calls_of[number]:
            assert await step_call(kind, [number, -number]) == [f"{kind} of {number}", f"{kind} of {-number}"]
        return number

    return made, asyncio.run(lockstep([group(number) for number in range(len(calls_of))], engines))


def test_lockstep_calls_the_engines_as_joined_tasks_do() -> None:
    cases: list[list[list[str]]] = [
        [["sample", "score"], ["sample", "sample", "score"], [], ["score"]],
        [["sample", "score"]] * 3,
        [[], []],
        [],
    ]
    for calls in cases:
        engine_calls, returned = lockstep_of(calls)
        assert engine_calls == rounds_of(list(range(len(calls))), calls)
        assert returned == list(range(len(calls)))


def test_lockstep_raises_the_error_of_a_round_and_closes_every_group() -> None:
    closed = []

    async def broken(kind: str, items: list[Any]) -> list[Any]:
        raise TimeoutError(f"no {kind}")

    async def group(number: int) -> None:
        try:
            await step_call("score", [number])
        finally:
            closed.append(number)

    with pytest.raises(TimeoutError, match="no score"):
        asyncio.run(lockstep([group(0), group(1)], broken))
    assert closed == [0, 1]


def test_a_group_in_lockstep_may_await_engine_calls_only() -> None:
    async def group() -> None:
        await asyncio.sleep(1)

    with pytest.raises(RuntimeError, match=r"group awaits .*, which no engine answers"):
        asyncio.run(lockstep([group()], lambda kind, items: asyncio.sleep(0, items)))


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
