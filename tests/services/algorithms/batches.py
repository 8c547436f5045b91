"""A batch of an algorithm in simulated time, on real pools and the real ledger."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sdft.actors.shared.types import IntArray
from sdft.services.config.run import RunConfig
from sdft.services.data.pairs import PromptPair
from sdft.services.data.sources.fixed import FixedSource
from sdft.services.records.ledger import Ledger
from sdft.services.training.rollouts import Batch, Rollouts
from simulation import virtual_time
from simulation.cluster import Case, Student, Teacher, pool, prepared


class Texts:
    """Contexts of a record: the teacher's prompt is the text that it shows."""

    def teacher(self, **columns: str) -> IntArray:
        return np.frombuffer(columns["demonstration"].encode(), np.uint8).astype(np.int32)

    def text(self, ids: IntArray) -> str:
        return f"{len(ids)} tokens"

    def reply(self, ids: IntArray) -> str:
        return self.text(ids)

    def between(self, messages: Any) -> IntArray:
        raise AssertionError("no episode is played here")

    @property
    def row(self) -> dict[str, Any]:
        return {}


def first_batch(
    folder: Path,
    case: Case,
    method: Any,
    student: Callable[[int], Student],
    teacher: Callable[[int], Teacher],
    pair: PromptPair | None = None,
    sections: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Batch, dict[str, int]]:
    """Make the batch of step 1, two samples of each of 8 prompts, in simulated time. Returns it with the counts.

    method: its settings, or an algorithm. pair: the prompts of every record; None: those of the simulation.
    sections: of the run's configuration.
    """
    one = prepared(case, 8)
    (stage,) = one.stages
    source = stage.source if pair is None else FixedSource("simulated.jsonl", [], [pair] * 1000)
    settings = one.config.model_dump() | {"sampling": {"generations": 2}} | dict(sections)
    config = RunConfig.model_validate(settings | ({"method": method} if isinstance(method, dict) else {}))
    (task,) = config.tasks
    if not isinstance(method, dict):
        task = task.model_copy(update={"method": method})
    schedule = replace(stage.schedule, generations=2, source=source)
    stage = replace(stage, config=task, source=source, contexts=lambda index: Texts(), schedule=schedule)

    async def run() -> tuple[Batch, dict[str, int]]:
        students, teachers = pool(case, "student", 2, student), pool(case, "teacher", 1, teacher)
        await asyncio.gather(students.start(), teachers.start())
        ledger = Ledger(folder / "ledger.sqlite")

        async def ready() -> None: ...

        rollouts = Rollouts(replace(one, config=config, stages=(stage,)), students, {"": teachers}, ledger, ready, 0)
        rollouts.open(stage.schedule)
        rollouts.begin(0)
        batch = await rollouts.take(1)
        await asyncio.gather(students.stop(), teachers.stop())
        return batch, ledger.counts()

    return virtual_time.run(run())
