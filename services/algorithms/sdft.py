"""SDFT: the student samples, and the teacher, which sees the demonstration, scores (arXiv 2601.19897)."""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.actors.shared.drafts import Draft
from sdft.learner.config import ImportanceConfig, LossConfig
from sdft.services.algorithms.base import Distillation, Group, Student, Teacher, awaits_engines_only


class Sdft(Distillation):
    """Self-distillation: rollouts of the student, pulled to the teacher, which sees the demonstration."""

    plays: ClassVar[bool] = True
    figure: ClassVar[str] = (
        "The {name} of teacher and student on the student's tokens; the loss adds the importance weights "
        "and the options of method."
    )

    type: Literal["sdft"] = Field("sdft", description="The algorithm")
    importance: ImportanceConfig = ImportanceConfig()

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        return (self.loss(self.importance),)

    @property
    def label(self) -> str:
        return f"{self.divergence.type} divergence"

    @awaits_engines_only
    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        if group.player is not None:
            episodes = await group.player.play(group, student)
            return await group.scored(teacher, episodes, self.divergence.scored, self.skip_first)
        n = len(group.samples)
        completions = await student.complete([group.student_ids] * n, group.seeds)
        scores = await teacher.score([group.teacher_prompt] * n, completions, self.divergence.scored)
        return group.drafts(completions, scores, self.skip_first)
