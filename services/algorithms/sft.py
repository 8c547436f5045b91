"""SFT: the negative log-likelihood of the demonstrations' tokens. No engine samples or scores."""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.actors.shared.drafts import Draft, Turn, given
from sdft.learner.config import ImportanceConfig, LossConfig, Nll
from sdft.services.algorithms.base import Algorithm, Group, Student, Teacher


class Sft(Algorithm):
    """Supervised fine-tuning on the demonstrations' tokens."""

    student_samples: ClassVar[bool] = False
    teacher_scores: ClassVar[bool] = False
    trains_demonstrations: ClassVar[bool] = True
    figure: ClassVar[str] = "The {name} of the demonstrations' tokens, which is also the loss."

    type: Literal["sft"] = Field("sft", description="The algorithm")

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        return (LossConfig(divergence=Nll(), importance=ImportanceConfig(level="off")),)

    @property
    def label(self) -> str:
        return "sft on the demonstrations' own tokens"

    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        return demonstrated(group)


def demonstrated(group: Group) -> list[Draft]:
    """Return the demonstration as the completion of every sample of a group."""
    assert group.demonstration_ids is not None  # trains_demonstrations
    completion = given(group.step, group.demonstration_ids)
    return [
        Draft(sample, seed, (Turn(group.student_ids, completion),))
        for sample, seed in zip(group.samples, group.seeds, strict=True)
    ]
