"""Off-policy distillation, for comparison: the loss of SDFT on completions of the teacher."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sdft.actors.shared.drafts import Draft
from sdft.services.algorithms.base import Distillation, Group, Student, Teacher, awaits_engines_only


class OffPolicy(Distillation):
    """Distillation on completions of the teacher, which sees the demonstration. Without importance weights."""

    student_samples: ClassVar[bool] = False
    figure: ClassVar[str] = (
        "The {name} of teacher and student on the teacher's tokens; the loss adds only the options of method."
    )

    type: Literal["off_policy"] = Field("off_policy", description="The algorithm")

    @model_validator(mode="after")
    def _support_is_known(self) -> "OffPolicy":
        support = self.divergence.scored
        if support.likely:
            raise ValueError(
                f"divergence.support {support.of} is of the student's samples, and method off_policy has none; set "
                f"support: teacher or full"
            )
        return self

    @property
    def label(self) -> str:
        return f"on the teacher's samples, {self.divergence.type} divergence"

    @awaits_engines_only
    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        prompts = [group.teacher_prompt] * len(group.samples)
        completed = await teacher.complete(prompts, group.seeds)
        completions = [completion.not_by_student(group.step) for completion in completed]
        scores = await teacher.score(prompts, completions, self.divergence.scored)
        return group.drafts(completions, scores, self.skip_first)
