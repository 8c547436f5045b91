"""Engines that sleep while the learner steps: when, and what becomes of one that is lost meanwhile."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.actors.shared.drafts import Draft
from sdft.learner.types import StepResult
from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config
from sdft.services.training.learning import learn
from sdft.services.training.rollouts import Batch, Times
from simulation.engine import SimulatedEngine
from tests.fakes.pool_bench import Bench

NONE: Any = None


def sleepers(events: list[str]) -> Callable[[int], SimulatedEngine]:
    """Return a factory of engines that record when they sleep and wake."""

    class Sleeper(SimulatedEngine):
        def sleep(self) -> tuple[float, None]:
            events.append(f"{self.number} sleeps")
            return 0.01, None

        def wake(self) -> tuple[float, None]:
            events.append(f"{self.number} wakes")
            return 0.01, None

    return Sleeper


async def bench(events: list[str], sleeps: bool = True) -> Bench:
    made = Bench(strict=True, least=2, make=sleepers(events))
    made.pool.settings = replace(made.pool.settings, sleeps=sleeps)
    await made.pool.start()
    return made


class Learner:
    """Records its steps, of which the first may fail."""

    def __init__(self, events: list[str], fails: bool = False) -> None:
        self._events, self._fails = events, fails

    async def train_step(self, sequences: list[Draft]) -> StepResult:
        self._events.append("step")
        if self._fails:
            raise RuntimeError("the step failed")
        return StepResult(1, 1, 0, 0, 1, 1e-5, 0)


@pytest.mark.parametrize("fails", [False, True])
def test_engines_sleep_during_the_step_alone_also_if_it_fails(fails: bool) -> None:
    async def run() -> None:
        events: list[str] = []
        awake, asleep = await bench(events, sleeps=False), await bench(events)
        learner: Any = Learner(events, fails)
        work = learn(learner, [awake.pool, asleep.pool], Batch(1, [], Times()), NONE, None, events.append)
        if fails:
            with pytest.raises(RuntimeError, match="the step failed"):
                await work
        else:
            await work
        assert events == ["0 sleeps", "1 sleeps", "step", "0 wakes", "1 wakes"]
        await awake.pool.stop()
        await asleep.pool.stop()

    asyncio.run(run())


def test_an_engine_that_is_lost_while_it_sleeps_is_replaced_and_woken() -> None:
    async def run() -> None:
        events: list[str] = []
        made = await bench(events)
        async with made.pool.asleep():
            made.started[0].die()
        assert events[:2] == ["0 sleeps", "1 sleeps"]
        assert sorted(events[2:]) in (["0 wakes", "1 wakes"], ["0 wakes", "0 wakes", "1 wakes"])
        assert all(engine.up for engine in made.pool.engines)
        assert len(made.started) == 3
        await made.pool.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "needs device: cuda, because it frees memory of a GPU"),
        ({"device": "cuda", "training": {"steps": 1, "max_staleness": 2}}, "needs training.max_staleness 0, because"),
        (
            {"device": "cuda", "actors": {"student": {"sleep": True, "engine": "my.module:Mine"}}},
            "works with vLLM's engines only, and actors.student.engine is my.module:Mine",
        ),
    ],
)
def test_where_engines_cannot_sleep_the_setting_is_refused(tmp_path: Path, settings: Any, why: str) -> None:
    usual = {
        "model": "m",
        "data": {"train": "a.jsonl"},
        "training": {"steps": 1},
        "actors": {"student": {"sleep": True}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(usual | settings))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert f"actors.student.sleep {why}" in str(error.value)
    assert str(error.value).endswith("; remove it")
