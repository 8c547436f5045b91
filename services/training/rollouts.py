"""Batches of scored rollouts, made ahead of the learner as far as the allowed staleness reaches.

    schedule -> ids -> student engines: rollouts -> teacher engines: scores -> the learner, in the order of the steps

Pacing, not discarding: batch b is begun once the students hold weights of which batch b would be no more than
`max_staleness` steps old, so nothing is made that could not be trained on. In a strict run a batch is sampled whole and
then scored whole; else every sample goes its own way, and is scored as soon as its rollout has ended.
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
    """The running loop's clock, in seconds: the monotonic one, unless time is simulated."""
    return asyncio.get_running_loop().time()


@dataclass
class Times:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    async def of(self, phase: str, work: Awaitable[T]) -> T:
        began = now()
        try:
            return await work
        finally:
            self.seconds[phase] += now() - began


@dataclass(frozen=True)
class Batch:
    """What an optimizer step trains on, and how long it took to make."""

    step: int
    samples: list[ScoredRollout]
    times: Times

    @property
    def staleness(self) -> list[int]:
        """Steps that the weights of each rollout's first token are behind the weights that are trained."""
        return [self.step - 1 - s.rollout.versions[0][0] for s in self.samples]


@dataclass(frozen=True)
class _Part:
    """Some of a batch, and when it was sampled, the teachers were ready for it, and it was scored."""

    samples: list[ScoredRollout]
    ends: tuple[float, float, float]


class Rollouts:
    """Makes the batches of a run, each once."""

    def __init__(
        self,
        prepared: Prepared,
        students: EnginePool,
        teachers: EnginePool,
        ledger: Ledger,
        teachers_ready: Callable[[], Awaitable[None]],
        first_step: int,
    ) -> None:
        """teachers_ready: waits for weights that are on their way to the teachers."""
        self._prepared = prepared
        self._students, self._teachers = students, teachers
        self._ledger = ledger
        self._teachers_ready = teachers_ready
        self._making: dict[int, asyncio.Task[Batch]] = {}
        self.begun = first_step  # the last step whose batch has been begun
        self._open = first_step  # the last step of the stages that were opened

    def open(self, stage: StageSchedule) -> None:
        """Let a stage's batches be begun: its teacher is the one to score them."""
        self._open = stage.last

    def begin(self, student_version: int) -> None:
        """Begin every batch of an open stage that weights of this version may still be used for."""
        schedule = self._prepared.schedule
        last = min(self._open, student_version + 1 + self._prepared.config.training.max_staleness)
        for step in range(self.begun + 1, last + 1):
            ids = schedule.batch(step)
            self._ledger.issue(ids, step)
            self._making[step] = asyncio.create_task(self._make(step, ids), name=f"the rollouts of step {step}")
            self.begun = step

    async def take(self, step: int) -> Batch:
        """The batch of a step, once. Raises what went wrong in its making, or RuntimeError if it is too old."""
        batch = await self._making.pop(step)
        behind, allowed = max(batch.staleness), self._prepared.config.training.max_staleness
        if behind > allowed:
            raise RuntimeError(f"step {step}: a rollout was begun by weights {behind} steps behind, not {allowed}")
        return batch

    async def stop(self) -> None:
        """Give up what is being made."""
        await cancelled(self._making.values())

    async def _make(self, step: int, ids: list[SampleId]) -> Batch:
        began = now()
        if on_demonstrations(self._prepared.at(step).config):
            parts = [self._demonstrations(step, ids)]
        elif self._prepared.config.strict:
            parts = [await self._part(step, ids)]
        else:
            # One wait for all of it: a sample's own begins when an engine has room.
            limit = self._students.settings.work_s * (1 + self._prepared.config.training.max_staleness)
            work = asyncio.ensure_future(all_of([self._part(step, [sample]) for sample in ids]))
            try:
                # Shielded: who has what can still be told when it took too long.
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
        """The demonstrations as if the weights of the step before had sampled them; nobody scores them."""
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
        """Samples that are sampled together, and scored together."""
        stage = self._prepared.at(step)
        config, prompts = stage.config, [stage.prompts[s.index] for s in ids]
        seeds = [sample_seed(config.seed, s) for s in ids]
        s = config.sampling
        sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p)
        limited = self._prepared.config.strict  # else all of the batch is, by _make
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
    """A completion that the student did not sample, as a rollout: it knows no log-prob of it, and its age is none."""
    n = len(completion)
    unknown = np.full(n, np.nan, dtype=np.float32)
    return Rollout(_array(pair.student_ids), completion, unknown, ((step - 1, 0, n),), finish_reason)
