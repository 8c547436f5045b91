"""Off-policy distillation, for comparison: the loss of SDFT on completions of the teacher."""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.actors.shared.sequences import TrainingSequence, Turn, sequence_of
from sdft.services.algorithms.base import Distillation, Group, Student, Teacher, not_sampled


class OffPolicy(Distillation):
    """Distillation on completions of the teacher, which sees the demonstration. Without importance weights."""

    student_samples: ClassVar[bool] = False
    figure: ClassVar[str] = "The {name} of teacher and student on the teacher's tokens, which is also the loss."

    type: Literal["off_policy"] = Field("off_policy", description="The algorithm")

    @property
    def label(self) -> str:
        return f"on the teacher's samples, {self.divergence.type} divergence"

    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[TrainingSequence]:
        prompts = [group.teacher_prompt] * len(group.samples)
        completed = await teacher.complete(prompts, group.seeds)
        rollouts = [not_sampled(group.step, group.student_ids, r.completion_ids, r.finish_reason) for r in completed]
        scores = await teacher.score(prompts, rollouts, self.loss.top_k)
        return [
            sequence_of(sample, seed, [Turn(group.student_ids, rollout, score)], self.skip_first)
            for sample, seed, rollout, score in zip(group.samples, group.seeds, rollouts, scores, strict=True)
        ]
