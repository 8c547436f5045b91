"""An algorithm of a user's own: samples of one prompt teach each other."""

from typing import Literal

from sdft.actors.shared.sequences import TrainingSequence, Turn, sequence_of
from sdft.services.algorithms.base import Distillation, Group, Student, Teacher


class Siblings(Distillation):
    """The teacher of a sample sees the next sample of the same prompt in place of the demonstration."""

    type: Literal["siblings:Siblings"]
    sure: bool = False  # only completions that end by themselves teach

    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[TrainingSequence]:
        rollouts = await student.complete([group.student_ids] * len(group.samples), group.seeds)
        siblings = rollouts[1:] + rollouts[:1]
        taught = [i for i, other in enumerate(siblings) if other.finish_reason == "stop" or not self.sure]
        if not taught:
            return []  # these samples are dropped
        prompts = [
            group.contexts.teacher(demonstration=group.contexts.text(siblings[i].completion_ids)) for i in taught
        ]
        scores = await teacher.score(prompts, [rollouts[i] for i in taught], self.loss.top_k)
        return [
            sequence_of(group.samples[i], group.seeds[i], [Turn(group.student_ids, rollouts[i], score)], self.skipped)
            for i, score in zip(taught, scores, strict=True)
        ]
