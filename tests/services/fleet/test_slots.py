"""Dispatch of items to the least loaded worker."""

import asyncio

import pytest

from sdft.services.fleet.dispatch import Slots


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_items_go_to_the_least_loaded_worker_and_queue_in_order_when_all_are_full() -> None:
    async def run() -> None:
        slots: Slots[str] = Slots(3, Clock())
        slots.join("a")
        slots.join("b")
        assert [await slots.take() for _ in range(4)] == ["a", "b", "a", "b"]
        slots.give_back("b")
        slots.give_back("b")
        assert [await slots.take() for _ in range(4)] == ["b", "b", "a", "b"]
        assert slots.loads == {"a": 3, "b": 3}
        first, second = (asyncio.create_task(slots.take()) for _ in range(2))
        await asyncio.sleep(0)
        assert slots.queued == 2
        slots.give_back("b")
        slots.give_back("b")
        assert [await first, await second] == ["b", "b"]
        slots.give_back("a")
        assert await slots.take() == "a"

    asyncio.run(run())


def test_a_leaving_worker_gets_no_items_and_is_idle_once_all_are_given_back() -> None:
    async def run() -> None:
        slots: Slots[str] = Slots(2, Clock())
        slots.join("a")
        await slots.take()
        slots.leave("a")
        waiting, idle = asyncio.create_task(slots.take()), asyncio.create_task(slots.idle("a"))
        await asyncio.sleep(0)
        assert not idle.done()
        slots.give_back("a")
        await idle
        assert not waiting.done()
        slots.join("b")
        assert await waiting == "b"

    asyncio.run(run())


def test_a_cancelled_wait_holds_no_worker() -> None:
    """Cancelled while it waits, or after it was given a worker but before it ran."""

    async def run() -> None:
        slots: Slots[str] = Slots(1, Clock())
        slots.join("a")
        await slots.take()
        given_up, late, patient = (asyncio.create_task(slots.take()) for _ in range(3))
        await asyncio.sleep(0)
        given_up.cancel()
        slots.give_back("a")  # to `late`
        late.cancel()
        assert await patient == "a"

    asyncio.run(run())


def test_a_failure_reaches_every_waiter() -> None:
    async def run() -> None:
        slots: Slots[str] = Slots(1, Clock())
        waiting = asyncio.create_task(slots.take())
        await asyncio.sleep(0)
        slots.fail(RuntimeError("teacher engine 0 was lost 4 times"))
        for take in (waiting, slots.take()):
            with pytest.raises(RuntimeError, match="was lost 4 times"):
                await take

    asyncio.run(run())


def test_the_share_of_room_in_use_is_a_mean_over_time_and_members() -> None:
    async def run() -> None:
        clock = Clock()
        slots: Slots[str] = Slots(2, clock)
        slots.join("a")
        await slots.take()
        clock.now = 10.0  # one of two for 10 s
        slots.join("b")
        clock.now = 20.0  # one of four for 10 s
        assert slots.busy() == pytest.approx(20 / 60)
        slots.give_back("a")
        clock.now = 30.0
        assert slots.busy() == 0

    asyncio.run(run())


def test_memory_stays_bounded_however_many_items_pass() -> None:
    async def run() -> None:
        slots: Slots[int] = Slots(4, Clock())
        for worker in range(3):
            slots.join(worker)
        taken = [await slots.take() for _ in range(12)]
        for _ in range(5000):
            slots.give_back(taken.pop(0))
            taken.append(await slots.take())
        assert len(slots._free) < 200
        assert sorted(taken) == [0] * 4 + [1] * 4 + [2] * 4

    asyncio.run(run())
