"""Batches of drafts of training sequences, made ahead of the learner as far as max_staleness allows.

    schedule -> ids -> groups, one per record -> algorithm and engines -> the learner, in the order of the steps

Batches are paced, not discarded: a batch is begun once the student engines hold weights that will be at most
`max_staleness` steps old when it is trained on. No batch is too old to be trained on. In a strict run the calls of all
groups are joined: a batch is sampled whole and then scored whole. Otherwise each group is scored as soon as its
rollouts have ended.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from sdft.actors.shared.drafts import CompletionLost, Draft
from sdft.actors.shared.types import SampleId, Sampling
from sdft.actors.shared.waiting import all_of, cancelled, within
from sdft.services.algorithms.base import Group, Player
from sdft.services.base.errors import RunFailed
from sdft.services.data.schedule import StageSchedule, sample_seed
from sdft.services.data.thoughts import without_thoughts
from sdft.services.environments.player import EpisodePlayer
from sdft.services.fleet.pool import EnginePool
from sdft.services.grading.graders import GRADERS
from sdft.services.planning.prepared import Prepared, Stage
from sdft.services.records.ledger import Ledger
from sdft.services.training.calls import EngineCalls, GroupStudent, GroupTeacher, Mode, now

T = TypeVar("T")
TRIES = 5  # to make a batch, or a group, that loses completions with an engine


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
    """The drafts of one optimizer step, and the time they took."""

    step: int
    drafts: list[Draft]
    times: Times

    @cached_property
    def samples(self) -> list[SampleId]:
        """The samples that the drafts are of, in order, each once."""
        return list(dict.fromkeys(draft.sample for draft in self.drafts))

    @cached_property
    def staleness(self) -> list[int]:
        """Steps that the weights of each sequence's first sampled token are behind the weights that are trained."""
        return [self.step - 1 - draft.oldest_version for draft in self.drafts]


class Rollouts:
    """Makes each batch of a run once."""

    def __init__(
        self,
        prepared: Prepared,
        students: EnginePool,
        teachers: Mapping[str, EnginePool],
        ledger: Ledger,
        teachers_ready: Callable[[], Awaitable[None]],
        first_step: int,
    ) -> None:
        """teachers: by their routes; the only one by "".

        teachers_ready(): waits until the teacher engines have the weights that were sent.
        """
        self._prepared = prepared
        self._students, self._teachers = students, teachers
        self._ledger = ledger
        self._teachers_ready = teachers_ready
        self._making: dict[int, asyncio.Task[Batch]] = {}
        self.begun = first_step  # last step whose batch was begun
        self._opened: StageSchedule | None = None  # batches of later stages are not begun
        self._players: dict[int, EpisodePlayer] = {}  # by number of the stage
        self._lost: dict[SampleId, str] = {}  # why a sample has no episode

    def open(self, stage: StageSchedule) -> None:
        """Allow the batches of a stage to begin, once its teacher is in place to score them."""
        self._opened = stage

    def begin(self, student_version: int) -> None:
        """Begin every batch of the opened stage that may be sampled with weights of this version, and is ready."""
        stage, last = self._opened, student_version + 1 + self._prepared.config.training.max_staleness
        for step in range(self.begun + 1, last + 1):
            if stage is None or not stage.is_ready(step):
                return
            ids = stage.batch(step)
            self._ledger.issue(ids, step, stage.drawn(step))
            self._making[step] = asyncio.create_task(self._make(step, ids), name=f"the rollouts of step {step}")
            self.begun = step

    async def take(self, step: int) -> Batch:
        """Return the batch of a step, once. Raises the error of making it, or RuntimeError if a rollout is too old."""
        return self._young_enough(await self._making.pop(step))

    async def again(self, step: int) -> Batch:
        """Return a batch once more, because some of it was lost with an engine or a node after it was made."""
        return self._young_enough(await self._make(step, self._prepared.schedule.batch(step)))

    def _young_enough(self, batch: Batch) -> Batch:
        behind, allowed = max(batch.staleness), self._prepared.config.training.max_staleness
        if behind > allowed:
            raise RuntimeError(
                f"step {batch.step}: the weights of a rollout are {behind} steps behind, and {allowed} are allowed"
            )
        return batch

    async def stop(self) -> None:
        """Cancel the batches in progress, and end the environments."""
        await cancelled(self._making.values())
        await asyncio.gather(*(player.environments.stop() for player in self._players.values()))

    def _note_lost(self, sample: SampleId, reason: str | None) -> None:
        self._lost.pop(sample, None)
        if reason is not None:
            self._lost[sample] = reason

    def _player(self, step: int, stage: Stage) -> EpisodePlayer | None:
        """Return the player of a stage; None if it has no environment."""
        number, environment = self._prepared.schedule.at(step).stage, stage.config.environment
        if environment is None:
            return None
        if number not in self._players:
            longest = stage.config.sampling.max_new_tokens
            self._players[number] = EpisodePlayer(environment, longest, self._note_lost)
        return self._players[number]

    async def _make(self, step: int, ids: list[SampleId]) -> Batch:
        """Make a batch. In a strict run all of it is made again if a completion is lost, with the same bits."""
        made = partial(self._made, step, ids)
        return await (_retried(made) if self._prepared.config.strict else made())

    async def _made(self, step: int, ids: list[SampleId]) -> Batch:
        began, stage, strict = now(), self._prepared.at(step), self._prepared.config.strict
        groups, s = list(_groups(step, stage, ids, self._player(step, stage))), stage.config.sampling
        calls = EngineCalls(
            self._students,
            self._teachers,
            self._teachers_ready,
            Sampling(s.max_new_tokens, s.temperature, s.top_p, stage.config.method.likely),
            len(groups),
            _mode(stage, strict),
            self._prepared.config.teacher.temperature,
        )
        work = asyncio.ensure_future(self._all_of(stage, groups, calls, ids))
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
            at_work = [pool.at_work for pool in (self._students, *self._teachers.values())]
            raise TimeoutError(f"{error}: {'; '.join(at_work)}") from error
        finally:
            work.cancel()
            calls.cancel()
        drafts = [draft for of_group in made for draft in of_group]
        reasons = {sample: self._lost[sample] for sample in ids if sample in self._lost} if self._lost else {}
        if strict:
            drafts = self._accounted(ids, drafts)
        for sample in reasons:
            self._lost.pop(sample, None)
        if not drafts:
            why = f": {reason}" if (reason := next(iter(reasons.values()), "")) else ""
            if not why and stage.config.method.needs_success:
                why = ": none has passed; set method.without_success, raise sampling.generations, or add easier prompts"
            raise RunFailed(f"step {step}: the algorithm made no training sequence of its {len(ids)} samples{why}")
        ready = max(calls.sampled, calls.ready)
        times = Times()
        times.seconds |= {
            "rollout": calls.sampled - began,
            "sync": ready - calls.sampled,
            "score": max(0.0, calls.scored - ready),
        }
        return Batch(step, drafts, times)

    async def _all_of(
        self, stage: Stage, groups: Sequence[Group], calls: EngineCalls, ids: Sequence[SampleId]
    ) -> list[list[Draft]]:
        """Return the drafts of every group.

        The coroutines of the groups are made once this one runs: it may be cancelled before.
        """
        if calls.mode == "streamed":
            return await all_of([self._of_group(stage, i, group, calls) for i, group in enumerate(groups)])
        sampled = cache(partial(self._mark_sampled, ids))  # the samples of all groups move at once in the ledger
        if calls.mode == "joined":
            return await all_of([made_of(stage, i, group, calls, sampled) for i, group in enumerate(groups)])
        student, make = GroupStudent(calls, 0), stage.config.method.make
        teachers = {route: GroupTeacher(calls, 0, route, sampled) for route in ("", *self._teachers)}
        return await calls.lockstep([make(group, student, teachers[group.route]) for group in groups])

    async def _of_group(self, stage: Stage, number: int, group: Group, calls: EngineCalls) -> list[Draft]:
        """Let the algorithm make the drafts of one group, again if it loses a completion, and account for them."""
        sampled = partial(self._mark_sampled, group.samples)
        made = await _retried(partial(made_of, stage, number, group, calls, sampled))
        return self._accounted(group.samples, made)

    def _accounted(self, samples: Sequence[SampleId], made: list[Draft]) -> list[Draft]:
        """Move samples in the ledger by the drafts that were made of them. Returns the drafts of those that count."""
        self._mark_sampled(samples)
        tokens: dict[SampleId, int] = {}
        for draft in made:
            tokens[draft.sample] = tokens.get(draft.sample, 0) + draft.sampled_tokens
        # A group that is made again may have been scored before, and samples of it dropped.
        new = self._ledger.those(samples, "sampled")
        kept = [sample for sample in new if sample in tokens]
        self._ledger.advance(kept, "scored", [tokens[sample] for sample in kept])
        if len(kept) == len(samples):
            return made
        for sample in samples:
            if sample not in tokens and self._ledger.state(sample) is not None:
                reason = self._lost.get(sample, "the algorithm made no training sequence of it")
                self._ledger.drop(sample, reason)
        return [draft for draft in made if self._ledger.state(draft.sample) is not None]

    def _mark_sampled(self, samples: Sequence[SampleId]) -> None:
        """Move samples to sampled, all at once and once."""
        if self._ledger.state(samples[0]) == "issued":
            self._ledger.advance(samples, "sampled")


async def made_of(
    stage: Stage, number: int, group: Group, calls: EngineCalls, sampled: Callable[[], None]
) -> list[Draft]:
    """Return the drafts that the algorithm makes of one group. sampled(): called before its completions are scored."""
    teacher = GroupTeacher(calls, number, group.route, sampled)
    made = await stage.config.method.make(group, GroupStudent(calls, number), teacher)
    calls.done()
    return made


def _mode(stage: Stage, strict: bool) -> Mode:
    if not strict:
        return "streamed"
    engines_only = getattr(type(stage.config.method).make, "engines_only", False)
    return "lockstep" if engines_only and stage.config.environment is None else "joined"


async def _retried(make: Callable[[], Awaitable[T]]) -> T:
    """Return what `make` makes, TRIES times at most while completions are lost. The notices tell the lost engines."""
    for _ in range(TRIES - 1):
        try:
            return await make()
        except CompletionLost:
            continue
    return await make()


def _groups(step: int, stage: Stage, ids: list[SampleId], player: Player | None) -> Iterator[Group]:
    """Yield the groups of a batch: the samples of one record each."""
    rule, seed = stage.config.method.graded_by, stage.config.seed
    prompts = stage.prompts
    for (_, _, record), of_record in groupby(ids, key=itemgetter(slice(3))):
        samples, pair = tuple(of_record), prompts[record]
        yield Group(
            step=step,
            samples=samples,
            seeds=tuple([sample_seed(seed, sample) for sample in samples]),
            student_ids=pair.student_ids,
            teacher_ids=pair.teacher_ids,
            demonstration_ids=pair.demonstration_ids,
            demonstration_mask=pair.demonstration_mask,
            route=pair.route,
            contexts=stage.contexts(record),
            player=player,
            grade=None if rule is None else partial(_is_right, rule, stage.source.records[record].answer),
        )


def _is_right(rule: str, answer: Any, reply: str) -> bool:
    return GRADERS[rule].grade(without_thoughts(reply), answer)
