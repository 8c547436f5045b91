"""Batches of scored rollouts, made ahead of the learner as far as max_staleness allows.

    schedule -> ids -> student engines: rollouts -> teacher engines: scores -> the learner, in the order of the steps

Batches are paced, not discarded: a batch is begun once the student engines hold weights that will be at most
`max_staleness` steps old when it is trained on. No batch is too old to be trained on. In a strict run a batch is
sampled whole and then scored whole. Otherwise each sample is scored as soon as its rollout has ended.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from sdft.actors.shared.types import (
    GenerateRequest,
    IntArray,
    Rollout,
    SampleId,
    Sampling,
    ScoredRollout,
    TeacherScores,
)
from sdft.actors.shared.waiting import all_of, cancelled, within
from sdft.services.algorithms.methods import on_demonstrations, on_policy
from sdft.services.data.contexts import PromptPair
from sdft.services.data.schedule import StageSchedule, sample_seed
from sdft.services.fleet.pool import EnginePool
from sdft.services.planning.prepare import Prepared
from sdft.services.records.ledger import Ledger

T = TypeVar("T")


def now() -> float:
    """Return the running loop's time in seconds: the monotonic clock, unless time is simulated."""
    return asyncio.get_running_loop().time()


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
    """The scored rollouts of one optimizer step, and the time they took."""

    step: int
    samples: list[ScoredRollout]
    times: Times

    @property
    def staleness(self) -> list[int]:
        """Steps that the weights of each rollout's first token are behind the weights that are trained."""
        return [self.step - 1 - s.rollout.versions[0][0] for s in self.samples]


@dataclass(frozen=True)
class _Part:
    """A part of a batch. ends: times at which it was sampled, the teachers were ready, and it was scored."""

    samples: list[ScoredRollout]
    ends: tuple[float, float, float]


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
        self._opened: StageSchedule | None = None  # batches of later stages are not begun

    def open(self, stage: StageSchedule) -> None:
        """Allow the batches of a stage to begin, once its teacher is in place to score them."""
        self._opened = stage

    def begin(self, student_version: int) -> None:
        """Begin every batch of the opened stage that may be sampled with weights of this version, and is there."""
        stage, last = self._opened, student_version + 1 + self._prepared.config.training.max_staleness
        for step in range(self.begun + 1, last + 1):
            if stage is None or not stage.is_there(step):
                return
            ids = stage.batch(step)
            self._ledger.issue(ids, step, stage.drawn(step))
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
        began = now()
        if on_demonstrations(self._prepared.at(step).config):
            parts = [self._demonstrations(step, ids)]
        elif self._prepared.config.strict:
            parts = [await self._part(step, ids)]
        else:
            # One limit for the whole batch: samples queue until an engine has room, so they have no limit of their own.
            limit = self._students.settings.batch_s * (1 + self._prepared.config.training.max_staleness)
            work = asyncio.ensure_future(all_of([self._part(step, [sample]) for sample in ids]))
            try:
                # Shielded, so that after a timeout the error can still list which engine has what.
                parts = await within(asyncio.shield(work), limit, f"the rollouts and scores of step {step}")
            except TimeoutError as error:
                raise TimeoutError(f"{error}: {self._students.at_work}; {self._teachers.at_work}") from error
            finally:
                work.cancel()
        sampled, ready, scored = (max(times) for times in zip(*(part.ends for part in parts), strict=True))
        times = Times()
        times.seconds |= {"rollout": sampled - began, "sync": ready - sampled, "score": scored - ready}
        return Batch(step, [sample for part in parts for sample in part.samples], times)

    def _demonstrations(self, step: int, ids: list[SampleId]) -> _Part:
        """Return the demonstrations as if the previous step's weights had sampled them. No teacher scores them."""
        samples, prompts = [], self._prepared.at(step).prompts
        for sample in ids:
            pair = prompts[sample.index]
            reply = _array(pair.demonstration_ids)
            rollout = _off_policy(step, pair, reply, "stop")
            certain = np.zeros((len(reply), 1), dtype=np.float32)
            samples.append(ScoredRollout(sample, rollout, TeacherScores(reply[:, None], certain, certain[:, 0], 0)))
        self._ledger.advance(ids, "sampled", [len(s.rollout.completion_ids) for s in samples])
        self._ledger.advance(ids, "scored")
        return _Part(samples, (now(), now(), now()))

    async def _part(self, step: int, ids: list[SampleId]) -> _Part:
        """Sample the given samples together, then score them together."""
        stage = self._prepared.at(step)
        config, prompts = stage.config, [stage.prompts[s.index] for s in ids]
        seeds = [sample_seed(config.seed, s) for s in ids]
        s = config.sampling
        sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p)
        limited = self._prepared.config.strict  # otherwise _make limits the whole batch
        if on_policy(config):
            requests = [GenerateRequest(_array(p.student_ids), seed) for p, seed in zip(prompts, seeds, strict=True)]
            rollouts = await self._students.generate(requests, sampling, limited)
        else:
            await self._teachers_ready()
            requests = [GenerateRequest(_array(p.teacher_ids), seed) for p, seed in zip(prompts, seeds, strict=True)]
            sampled_by_teacher = await self._teachers.generate(requests, sampling, limited)
            rollouts = [
                _off_policy(step, p, r.completion_ids, r.finish_reason)
                for p, r in zip(prompts, sampled_by_teacher, strict=True)
            ]
        sampled = now()
        self._ledger.advance(ids, "sampled", [len(r.completion_ids) for r in rollouts])
        pairs = [(_array(p.teacher_ids), r.completion_ids) for p, r in zip(prompts, rollouts, strict=True)]
        await self._teachers_ready()
        ready = now()
        scores = await self._teachers.score(pairs, config.loss.top_k, limited)
        self._ledger.advance(ids, "scored")
        return _Part([ScoredRollout(*row) for row in zip(ids, rollouts, scores, strict=True)], (sampled, ready, now()))


def _array(ids: list[int] | None) -> IntArray:
    return np.asarray(ids, dtype=np.int32)


def _off_policy(step: int, pair: PromptPair, completion: IntArray, finish_reason: str) -> Rollout:
    """Return a completion not sampled by the student as a rollout: log-probs NaN, weight version step - 1."""
    n = len(completion)
    unknown = np.full(n, np.nan, dtype=np.float32)
    return Rollout(_array(pair.student_ids), completion, unknown, ((step - 1, 0, n),), finish_reason)
