"""Base class of the algorithms that train the student's own samples alone, pulled to the teacher."""

from typing import ClassVar

from sdft.actors.shared.drafts import Draft
from sdft.learner.config import ImportanceConfig, LossConfig
from sdft.services.algorithms.base import Distillation, Group, Student, Teacher, awaits_engines_only


class OnPolicy(Distillation):
    """Rollouts of the student, scored by the teacher, with importance weights."""

    figure: ClassVar[str] = (
        "The {name} of teacher and student on the student's tokens; the loss adds the importance weights "
        "and the options of method."
    )

    importance: ImportanceConfig = ImportanceConfig()

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        return (self.loss(self.importance),)

    @awaits_engines_only
    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        if group.player is not None:
            episodes = await group.player.play(group, student)
            return await group.scored(teacher, episodes, self.divergence.scored, self.skip_first)
        n = len(group.samples)
        completions = await student.complete([group.student_ids] * n, group.seeds)
        scores = await teacher.score([group.teacher_prompt] * n, completions, self.divergence.scored)
        return group.drafts(completions, scores, self.skip_first)
