"""Plays episodes: the student's replies and the environment's answers in turn, as tokens.

    prompt ─► student ─► completion ─► text ─► environment ─► messages ─► tokens between ─► student ─► ...

Sampled tokens are never tokenized again: the next prompt is the tokens so far, and what the chat template puts between
two replies. The episodes of a call go on in rounds, so the engines get the replies of one round together.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdft.actors.shared.drafts import Completion
from sdft.actors.shared.types import IntArray, SampleId
from sdft.services.algorithms.base import Contexts, Group, Student
from sdft.services.algorithms.base import Episode as Played
from sdft.services.base.errors import UserError
from sdft.services.config.environment import EnvironmentConfig
from sdft.services.data.schedule import seed_of
from sdft.services.environments.base import Done
from sdft.services.environments.child import EpisodeLost
from sdft.services.environments.pool import Environments, Episode

# prompts, seeds -> a completion and its tokens for each
Complete = Callable[[Sequence[IntArray], Sequence[int]], Awaitable[list[tuple[Completion, IntArray]]]]
TURNS = "it was not done after {} replies (environment.max_turns)"
TOKENS = "it has no room for another reply (environment.max_tokens)"
LENGTH = "a reply was cut at its largest length"


@dataclass
class _Running:
    """An episode that goes on."""

    prompt: IntArray
    seed: int
    contexts: Contexts
    episode: Episode | None = None
    before: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))  # since the last reply
    so_far: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    parts: list[tuple[IntArray, Completion, IntArray]] = field(default_factory=list)
    messages: list[Mapping[str, Any]] = field(default_factory=list)
    ended: Done | None = None
    cut: str = ""  # why it ended, if not by the environment
    lost: str | None = None

    @property
    def goes_on(self) -> bool:
        return self.ended is None and self.lost is None

    @property
    def played(self) -> Played | None:
        if self.lost is not None or not self.parts or self.ended is None:
            return None
        before, completions, ids = zip(*self.parts, strict=True)
        return Played(before, completions, ids, self.ended.passed, self.ended.feedback, self.cut, tuple(self.messages))


class EpisodePlayer:
    """Plays the episodes of one environment."""

    def __init__(
        self,
        config: EnvironmentConfig,
        max_new_tokens: int,
        lost: Callable[[SampleId, str | None], None] = lambda sample, reason: None,
    ) -> None:
        """max_new_tokens: of a reply. lost(): called with the reason why a sample has no episode; None: it has one."""
        self.environments = Environments(config)
        self._config, self._max_new_tokens, self._lost = config, max_new_tokens, lost

    async def play(self, group: Group, student: Student) -> list[Played | None]:
        """Return an episode for each sample of a group; None if it was lost."""

        async def complete(prompts: Sequence[IntArray], seeds: Sequence[int]) -> list[tuple[Completion, IntArray]]:
            completions = await student.complete(prompts, seeds)
            return list(zip(completions, await student.tokens(completions), strict=True))

        starts = [(group.student_ids, seed, group.contexts) for seed in group.seeds]
        found = await self.play_all(starts, complete)
        for sample, (episode, reason) in zip(group.samples, found, strict=True):
            self._lost(sample, reason if episode is None else None)
        return [episode for episode, _ in found]

    async def play_all(
        self, starts: Sequence[tuple[IntArray, int, Contexts]], complete: Complete
    ) -> list[tuple[Played | None, str]]:
        """Play an episode for each prompt, seed and record. Returns it, or None and the reason why it was lost."""
        running = [_Running(prompt, seed, contexts, before=prompt, so_far=prompt) for prompt, seed, contexts in starts]
        async with self.environments.room(len(running)):
            try:
                await asyncio.gather(*map(self._begin, running))
                for turn in range(1, self._config.max_turns + 1):
                    active = [r for r in running if r.goes_on]
                    if not active:
                        break
                    seeds = [r.seed if turn == 1 else seed_of(f"{r.seed}/{turn}") for r in active]
                    made = await complete([r.so_far for r in active], seeds)
                    await asyncio.gather(*(self._turn(r, turn, *m) for r, m in zip(active, made, strict=True)))
            finally:
                await asyncio.gather(*(r.episode.close() for r in running if r.episode is not None))
        return [(r.played, r.lost or "") for r in running]

    async def _begin(self, running: _Running) -> None:
        try:
            running.episode = await self.environments.begin(running.contexts.row)
        except EpisodeLost as lost:
            running.lost = f"environment: {lost}"

    async def _turn(self, running: _Running, turn: int, completion: Completion, ids: IntArray) -> None:
        """Give a reply to the environment, and its answer to the student."""
        assert running.episode is not None
        running.parts.append((running.before, completion, ids))
        text = running.contexts.reply(ids)
        running.messages.append({"role": "assistant", "content": text})
        if completion.finish_reason == "length":
            running.ended, running.cut = Done(False), LENGTH
            return
        try:
            answer = await running.episode.step(text)
            if isinstance(answer, Done):
                running.ended = answer
                return
            running.before = running.contexts.between(answer)
            running.messages += answer
        except (EpisodeLost, UserError) as error:
            running.lost = f"environment: {error}"
            return
        running.so_far = np.concatenate([running.so_far, ids, running.before])
        if turn == self._config.max_turns:
            running.ended, running.cut = Done(False), TURNS.format(turn)
        elif len(running.so_far) - len(running.prompt) + self._max_new_tokens > self._config.max_tokens:
            running.ended, running.cut = Done(False), TOKENS
