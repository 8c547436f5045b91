"""An algorithm of a user's own: samples of one prompt teach each other."""

from typing import Literal

from sdft.actors.shared.drafts import Draft, Turn
from sdft.services.algorithms.base import Distillation, Group, Student, Teacher


class Siblings(Distillation):
    """The teacher of a sample sees the next sample of the same prompt in place of the demonstration."""

    type: Literal["siblings:Siblings"]
    sure: bool = False  # only completions that end by themselves teach

    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        completions = await student.complete([group.student_ids] * len(group.samples), group.seeds)
        siblings = completions[1:] + completions[:1]
        taught = [i for i, other in enumerate(siblings) if other.finish_reason == "stop" or not self.sure]
        if not taught:
            return []  # these samples are dropped
        texts = [group.contexts.text(ids) for ids in await student.tokens([siblings[i] for i in taught])]
        prompts = [group.contexts.teacher(demonstration=text) for text in texts]
        scores = await teacher.score(prompts, [completions[i] for i in taught], self.divergence.scored)
        return [
            Draft(group.samples[i], group.seeds[i], (Turn(group.student_ids, completions[i], score),), self.skipped)
            for i, score in zip(taught, scores, strict=True)
        ]
