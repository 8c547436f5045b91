"""The engines as an algorithm calls them, for the groups of one batch.

lockstep, joined: the calls of all groups are joined (joined.py), and each has the limit of the pool
streamed:         each group calls by itself; the whole batch has one limit (rollouts.py)
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar

from sdft.actors import held
from sdft.actors.shared.drafts import Completion, CompletionLost, Draft, Scores, joined
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import GenerateRequest, IntArray, Rollout, Sampling, Support
from sdft.learner.group import SequencesLost
from sdft.services.fleet.pool import EnginePool, Work
from sdft.services.training.joined import Joined, lockstep, step_call

T = TypeVar("T")
Mode = Literal["lockstep", "joined", "streamed"]
# What is called: an engine's role, or the support of scores; and the route of the teacher.
Kind = tuple[Literal["student", "teacher"] | Support, str]


def now() -> float:
    """Return the running loop's time in seconds: the monotonic clock, unless time is simulated."""
    return asyncio.get_running_loop().time()


async def fetched(drafts: Sequence[Draft]) -> list[TrainingSequence]:
    """Fetch the values of drafts into this process. Raises SequencesLost if some were lost with an engine."""
    sequences, lost = [], []
    for draft in drafts:
        try:
            sequences.append(joined(draft, await held.fetched(draft.references)))
        except CompletionLost:
            lost.append(draft.sample)
    if lost:
        raise SequencesLost(lost)
    return sequences


class EngineCalls:
    """The engine calls of one batch, and when they ended."""

    def __init__(
        self,
        students: EnginePool,
        teachers: Mapping[str, EnginePool],
        teachers_ready: Callable[[], Awaitable[None]],
        sampling: Sampling,
        groups: int,
        mode: Mode,
        temperature: float = 1.0,
    ) -> None:
        """teachers: by their routes. temperature: teacher.temperature.

        teachers_ready(): waits until the teacher engines have the weights that were sent.
        """
        self._students, self._teachers, self._teachers_ready = students, teachers, teachers_ready
        self._sampling, self.mode, self._temperature = sampling, mode, temperature
        self._limited = mode != "streamed"
        self._joined: Joined[Kind] = Joined(groups, self._call)
        self.sampled = self.ready = self.scored = now()  # ends of the last call of a kind; ready: of the last wait

    def of(self, group: int, kind: Kind, items: list[Any]) -> Work[Any]:
        """Return an awaitable of the results of a group's items. Plain, as `complete`: there is one per sample."""
        if self.mode == "lockstep":
            return step_call(kind, items)
        return self._call(kind, items) if self.mode == "streamed" else self._joined.call(group, kind, items)

    async def lockstep(self, groups: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Return what each group returns, with mode lockstep."""
        return await lockstep(groups, self._call)

    def done(self) -> None:
        """Note that a group makes no more calls, with mode joined."""
        self._joined.done()

    def cancel(self) -> None:
        """Cancel the joined call in progress."""
        self._joined.cancel()

    async def _call(self, kind: Kind, items: list[Any]) -> list[Any]:
        what, route = kind
        if what == "student":
            results: list[Any] = await self._students.complete(items, self._sampling, self._limited)
            self.sampled = now()
            return results
        await self._teachers_ready()
        teachers = self._teachers[route]
        if what == "teacher":
            results = await teachers.complete(items, self._sampling, self._limited)
            self.sampled = now()
            return results
        self.ready = now()
        support = what._replace(temperature=self._temperature)
        results = await teachers.score_completions(items, support, self._limited)
        self.scored = now()
        return results


class GroupStudent:
    """The student engines for one group."""

    _complete: Kind = ("student", "")

    def __init__(self, calls: EngineCalls, group: int) -> None:
        self._calls, self._group = calls, group

    def complete(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> Work[Completion]:
        requests = [GenerateRequest(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return self._calls.of(self._group, self._complete, requests)

    async def tokens(self, completions: Sequence[Completion]) -> list[IntArray]:
        return [rollout.completion_ids for rollout in await self.rollouts(completions)]

    async def rollouts(self, completions: Sequence[Completion]) -> list[Rollout]:
        return await held.fetched([completion.rollout for completion in completions])


class GroupTeacher(GroupStudent):
    """The engines of a group's teacher."""

    def __init__(self, calls: EngineCalls, group: int, route: str, before_scores: Callable[[], None]) -> None:
        """route: of the group. before_scores(): called when it has its completions, before they are scored."""
        super().__init__(calls, group)
        self._route, self._before_scores = route, before_scores
        self._complete = "teacher", route

    def score(self, prompts: Sequence[IntArray], completions: Sequence[Completion], support: Support) -> Work[Scores]:
        self._before_scores()
        return self._calls.of(self._group, (support, self._route), list(zip(prompts, completions, strict=True)))
