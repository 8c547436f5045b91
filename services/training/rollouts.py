"""Batches of training sequences, made ahead of the learner as far as max_staleness allows.

    schedule -> ids -> groups, one per record -> algorithm and engines -> the learner, in the order of the steps

Batches are paced, not discarded: a batch is begun once the student engines hold weights that will be at most
`max_staleness` steps old when it is trained on. No batch is too old to be trained on. In a strict run the calls of all
groups are joined: a batch is sampled whole and then scored whole. Otherwise each group is scored as soon as its
rollouts have ended.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

import numpy as np

from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import IntArray, SampleId, Sampling
from sdft.actors.shared.waiting import all_of, cancelled, within
from sdft.services.algorithms.base import Group
from sdft.services.base.errors import RunFailed
from sdft.services.data.schedule import StageSchedule, sample_seed
from sdft.services.fleet.pool import EnginePool
from sdft.services.planning.prepare import Prepared, Stage
from sdft.services.records.ledger import Ledger
from sdft.services.training.calls import EngineCalls, GroupStudent, GroupTeacher, now

T = TypeVar("T")


@dataclass
class Times:
    """Adds up seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    async def of(self, phase: str, work: Awaitable[T]) -> T:
        began = now()
        try:
            return await work
        finally:
            self.seconds[phase] += now() - began


@dataclass(frozen=True)
class Batch:
    """The training sequences of one optimizer step, and the time they took."""

    step: int
    sequences: list[TrainingSequence]
    times: Times

    @property
    def samples(self) -> list[SampleId]:
        """The samples that the sequences are of, in order, each once."""
        return list(dict.fromkeys(s.sample for s in self.sequences))

    @property
    def staleness(self) -> list[int]:
        """Steps that the weights of each sequence's first sampled token are behind the weights that are trained."""
        return [self.step - 1 - s.spans[0].version for s in self.sequences]


class Rollouts:
    """Makes each batch of a run once."""

    def __init__(
        self,
        prepared: Prepared,
        students: EnginePool,
        teachers: EnginePool,
        ledger: Ledger,
        teachers_ready: Callable[[], Awaitable[None]],
        first_step: int,
    ) -> None:
        """teachers_ready(): waits until the teacher engines have the weights that were sent."""
        self._prepared = prepared
        self._students, self._teachers = students, teachers
        self._ledger = ledger
        self._teachers_ready = teachers_ready
        self._making: dict[int, asyncio.Task[Batch]] = {}
        self.begun = first_step  # last step whose batch was begun
        self._open = first_step  # last step of the opened stages

    def open(self, stage: StageSchedule) -> None:
        """Allow the batches of a stage to begin, once its teacher is in place to score them."""
        self._open = stage.last

    def begin(self, student_version: int) -> None:
        """Begin every batch of the opened stages that may be sampled with weights of this version."""
        schedule = self._prepared.schedule
        last = min(self._open, student_version + 1 + self._prepared.config.training.max_staleness)
        for step in range(self.begun + 1, last + 1):
            ids = schedule.batch(step)
            self._ledger.issue(ids, step)
            self._making[step] = asyncio.create_task(self._make(step, ids), name=f"the rollouts of step {step}")
            self.begun = step

    async def take(self, step: int) -> Batch:
        """Return the batch of a step, once. Raises the error of making it, or RuntimeError if a rollout is too old."""
        batch = await self._making.pop(step)
        behind, allowed = max(batch.staleness), self._prepared.config.training.max_staleness
        if behind > allowed:
            raise RuntimeError(
                f"step {step}: the weights of a rollout are {behind} steps behind, and {allowed} are allowed"
            )
        return batch

    async def stop(self) -> None:
        """Cancel the batches in progress."""
        await cancelled(self._making.values())

    async def _make(self, step: int, ids: list[SampleId]) -> Batch:
        began, stage, strict = now(), self._prepared.at(step), self._prepared.config.strict
        groups, s = list(_groups(step, stage, ids)), stage.config.sampling
        calls = EngineCalls(
            self._students,
            self._teachers,
            self._teachers_ready,
            Sampling(s.max_new_tokens, s.temperature, s.top_p),
            len(groups),
            strict,
        )
        work = asyncio.ensure_future(all_of([self._sequences(stage, i, g, calls) for i, g in enumerate(groups)]))
        try:
            if strict:
                made = await work
            else:
                # One limit for the whole batch: samples queue until an engine has room, so they have no limit of their
                # own. Shielded, so that after a timeout the error can still list which engine has what.
                limit = self._students.settings.batch_s * (1 + self._prepared.config.training.max_staleness)
                made = await within(asyncio.shield(work), limit, f"the rollouts and scores of step {step}")
        except TimeoutError as error:
            if strict:
                raise
            raise TimeoutError(f"{error}: {self._students.at_work}; {self._teachers.at_work}") from error
        finally:
            work.cancel()
            calls.cancel()
        sequences = [sequence for of_group in made for sequence in of_group]
        if not sequences:
            raise RunFailed(f"step {step}: the algorithm made no training sequence of its {len(ids)} samples")
        ready = max(calls.sampled, calls.ready)
        times = Times()
        times.seconds |= {
            "rollout": calls.sampled - began,
            "sync": ready - calls.sampled,
            "score": max(0.0, calls.scored - ready),
        }
        return Batch(step, sequences, times)

    async def _sequences(self, stage: Stage, number: int, group: Group, calls: EngineCalls) -> list[TrainingSequence]:
        """Let the algorithm make the sequences of one group, and move its samples in the ledger."""
        sampled = False

        def mark_sampled() -> None:
            nonlocal sampled
            if not sampled:
                self._ledger.advance(group.samples, "sampled")
            sampled = True

        student, teacher = GroupStudent(calls, number), GroupTeacher(calls, number, mark_sampled)
        made = await stage.config.method.make(group, student, teacher)
        calls.done()
        mark_sampled()
        tokens = dict.fromkeys(group.samples, 0)
        for sequence in made:
            tokens[sequence.sample] += sequence.sampled_tokens
        kept = [sample for sample in group.samples if any(sequence.sample == sample for sequence in made)]
        for sample in set(group.samples) - set(kept):
            self._ledger.drop(sample, "the algorithm made no training sequence of it")
        self._ledger.advance(kept, "scored", [tokens[sample] for sample in kept])
        return made


def _groups(step: int, stage: Stage, ids: list[SampleId]) -> Iterator[Group]:
    """Yield the groups of a batch: the samples of one record each."""
    for (_, _, index), of_record in groupby(ids, key=lambda s: (s.stage, s.epoch, s.index)):
        samples, pair = tuple(of_record), stage.prompts[index]
        yield Group(
            step=step,
            samples=samples,
            seeds=tuple(sample_seed(stage.config.seed, sample) for sample in samples),
            student_ids=_array(pair.student_ids),
            teacher_ids=None if pair.teacher_ids is None else _array(pair.teacher_ids),
            demonstration_ids=None if pair.demonstration_ids is None else _array(pair.demonstration_ids),
            contexts=stage.contexts[index],
        )


def _array(ids: list[int]) -> IntArray:
    return np.asarray(ids, dtype=np.int32)
