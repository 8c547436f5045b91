"""SDPO: the teacher sees what a successful attempt of the same group did, or what was wrong with this one.

    samples of a record ─► passed? ─┬─► another one has passed: the teacher's prompt shows it as the demonstration
                                    └─► none has: `without_success` says what the teacher sees
    each sample ─► scored behind its own teacher's prompt ─► divergence on the student's tokens

Self-distilled policy optimisation (Hübotter et al. 2026, arXiv 2601.20802).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from sdft.actors.shared.drafts import Draft
from sdft.actors.shared.types import IntArray
from sdft.services.algorithms.base import Episode, Group, Student, Teacher
from sdft.services.algorithms.on_policy import OnPolicy
from sdft.services.base.errors import PromptTooLong

Rule = Literal["exact", "contains", "choice", "numeric", "tool_call", "instruction"]


class Sdpo(OnPolicy):
    """Self-distillation from the student's own successes. `sampling.generations` is the size of a group."""

    plays: ClassVar[bool] = True
    needs_success: ClassVar[bool] = True

    type: Literal["sdpo"] = Field("sdpo", description="The algorithm")
    grader: Rule | None = Field(
        None,
        description="The rule that says from a row's answer whether a reply has passed; null: the environment says",
    )
    without_success: Literal["skip", "feedback", "demonstration"] = Field(
        "skip",
        description="What the teacher sees of a sample without a successful sibling: skip leaves the sample out, "
        "feedback shows that of the environment, demonstration the row's",
    )

    @property
    def label(self) -> str:
        return f"from successful siblings, {self.divergence.type} divergence"

    @property
    def graded_by(self) -> str | None:
        return self.grader

    @property
    def needs_context(self) -> bool:
        return self.without_success == "demonstration"

    @property
    def shows_feedback(self) -> bool:
        return self.without_success == "feedback"

    @property
    def least_generations(self) -> int:
        return 2 if self.without_success == "skip" else 1

    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        episodes = await group.episodes(student)
        said = await self._said(group, student, episodes)
        passed = [self._passed(group, episode, text) for episode, text in zip(episodes, said, strict=True)]
        prompts = [self._prompt(group, i, episodes, said, passed) for i in range(len(episodes))]
        return await group.scored(teacher, episodes, self.divergence.scored, self.skip_first, prompts)

    async def _said(self, group: Group, student: Student, episodes: Sequence[Episode | None]) -> list[Any]:
        """Return each episode as a demonstration: its conversation, or the text of its one reply."""
        alone = [e.completions[0] for e in episodes if e is not None and not e.messages]
        texts = iter(list(map(group.contexts.reply, await student.tokens(alone))) if alone else [])
        return [None if e is None else _shown(e.messages) if e.messages else next(texts) for e in episodes]

    def _passed(self, group: Group, episode: Episode | None, said: Any) -> bool:
        if episode is None or said is None:
            return False
        return bool(episode.passed) if group.grade is None else group.grade(said)

    def _prompt(
        self, group: Group, i: int, episodes: Sequence[Episode | None], said: Sequence[Any], passed: Sequence[bool]
    ) -> IntArray | None:
        """Return the teacher's prompt of a sample; None: it is left out."""
        episode, n = episodes[i], len(episodes)
        if episode is None:
            return None
        sibling = next((j for j in ((i + k) % n for k in range(1, n)) if passed[j]), None)
        try:
            if sibling is not None:
                return group.contexts.teacher(demonstration=said[sibling])
            if self.without_success == "feedback" and episode.feedback and not passed[i]:
                return group.contexts.teacher(demonstration=None, feedback=episode.feedback)
        except PromptTooLong:
            return None
        return group.teacher_ids if self.without_success == "demonstration" else None


def _shown(messages: Sequence[Any]) -> Any:
    """Return a conversation as a demonstration; one reply alone as its text."""
    return messages[0]["content"] if len(messages) == 1 else messages
