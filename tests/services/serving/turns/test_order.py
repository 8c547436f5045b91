"""Owners use one engine in turns: never two at once, no load without need, and no wait without end."""

import asyncio
import random

import pytest

from sdft.services.serving.turns.order import Turns


class Engine:
    """Holds the weights of one owner, and checks who uses it."""

    def __init__(self) -> None:
        self.holds = "a"
        self.using: list[str] = []
        self.loads: list[str] = []

    async def load(self, owner: str) -> None:
        assert not self.using, f"weights of {owner} are loaded while {self.using} use the engine"
        if owner == "broken":
            raise OSError("the weights are gone")
        await asyncio.sleep(0)
        self.holds = owner
        self.loads.append(owner)

    async def use(self, turns: Turns, owner: str, steps: int = 1) -> None:
        async with turns.of(owner):
            self.using.append(owner)
            try:
                for _ in range(steps):
                    await asyncio.sleep(0)
                    assert self.holds == owner
            finally:
                self.using.remove(owner)


def test_uses_of_one_owner_go_on_at_once_and_load_nothing() -> None:
    async def run() -> list[str]:
        engine = Engine()
        turns = Turns(engine.load, "a")
        first = asyncio.create_task(engine.use(turns, "a", 9))
        await asyncio.sleep(0)
        await engine.use(turns, "a")
        assert engine.using == ["a"]
        await first
        return engine.loads

    assert asyncio.run(run()) == []


def test_an_owner_that_waits_gets_the_next_turn() -> None:
    """Later uses of the current owner wait behind it, and all uses of an owner share its turn."""

    async def run() -> list[str]:
        engine, ends = Engine(), []
        turns = Turns(engine.load, "a")

        async def one(name: str, owner: str) -> None:
            await engine.use(turns, owner, 3)
            ends.append(name)

        tasks = []
        for name, owner in (("a1", "a"), ("b1", "b"), ("a2", "a"), ("b2", "b"), ("a3", "a")):
            tasks.append(asyncio.create_task(one(name, owner)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert engine.loads == ["b", "a"]
        return ends

    assert asyncio.run(run()) == ["a1", "b1", "b2", "a2", "a3"]


def test_changed_weights_are_loaded_before_the_next_use() -> None:
    async def run() -> list[str]:
        engine = Engine()
        turns = Turns(engine.load, "a")
        turns.outdated("b")  # not those that the engine holds
        await engine.use(turns, "a")
        turns.outdated("a")
        await asyncio.gather(engine.use(turns, "a"), engine.use(turns, "a"))
        return engine.loads

    assert asyncio.run(run()) == ["a"]


def test_a_load_that_fails_is_raised_to_its_owner_alone() -> None:
    async def run() -> list[str]:
        engine = Engine()
        turns = Turns(engine.load, "a")
        first = asyncio.create_task(engine.use(turns, "a", 3))
        await asyncio.sleep(0)
        found = await asyncio.gather(
            engine.use(turns, "broken"), engine.use(turns, "b"), engine.use(turns, "broken"), return_exceptions=True
        )
        assert [type(result) for result in found] == [OSError, type(None), OSError]
        await first
        await engine.use(turns, "a")
        return engine.loads

    assert asyncio.run(run()) == ["b", "a"]


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_uses_and_cancellations_ends(seed: int) -> None:
    """40 uses by three owners, of which a third are cancelled at some time."""
    chance = random.Random(seed)

    async def run() -> int:
        engine = Engine()
        turns = Turns(engine.load, "a")
        tasks = []
        for _ in range(40):
            task = asyncio.create_task(engine.use(turns, chance.choice("abc"), chance.randrange(4)))
            tasks.append(task)
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                victim = chance.choice(tasks)
                victim.cancel()
        async with asyncio.timeout(10):
            found = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [result for result in found if isinstance(result, Exception)]
        assert not wrong, wrong
        await engine.use(turns, "c")
        return len([result for result in found if result is None])

    assert asyncio.run(run()) >= 10
