"""Hindsight: the teacher sees what a user said next after an earlier reply to the same prompt.

    logged conversation ─► history, reply, the user's next message
    history ─► the student samples; history, reply and next message ─► the teacher scores the student's tokens

Learning from users' next messages (Kleine Buening et al. 2026, arXiv 2603.12273), with rollouts of the student.
"""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.actors.shared.drafts import Draft
from sdft.learner.config import ImportanceConfig, LossConfig
from sdft.services.algorithms.base import Distillation, Group, Student, Teacher, awaits_engines_only


class Hindsight(Distillation):
    """Self-distillation from logged conversations: the teacher sees an earlier reply and the user's next message."""

    from_conversations: ClassVar[bool] = True
    learns_from: ClassVar[str] = "replies with what was said next"
    figure: ClassVar[str] = (
        "The {name} of teacher and student on the student's tokens; the loss adds the importance weights "
        "and the options of method."
    )

    type: Literal["hindsight"] = Field("hindsight", description="The algorithm")
    importance: ImportanceConfig = ImportanceConfig()

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        return (self.loss(self.importance),)

    @property
    def label(self) -> str:
        return f"from users' next messages, {self.divergence.type} divergence"

    @awaits_engines_only
    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        n = len(group.samples)
        completions = await student.complete([group.student_ids] * n, group.seeds)
        scores = await teacher.score([group.teacher_prompt] * n, completions, self.divergence.scored)
        return group.drafts(completions, scores, self.skip_first)
