"""DFT: SFT with each token weighted by the student's own probability of it (Wu et al. 2025, arXiv 2508.05629)."""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.actors.shared.drafts import Draft
from sdft.learner.config import Dft as DftLoss
from sdft.learner.config import ImportanceConfig, LossConfig
from sdft.services.algorithms.base import Algorithm, Group, Student, Teacher
from sdft.services.algorithms.sft import demonstrated


class Dft(Algorithm):
    """Dynamic fine-tuning on the demonstrations' tokens. No gradient flows through the weights."""

    student_samples: ClassVar[bool] = False
    teacher_scores: ClassVar[bool] = False
    trains_demonstrations: ClassVar[bool] = True
    figure: ClassVar[str] = (
        "The {name} of the demonstrations' tokens; the loss weighs each by the student's probability of it."
    )

    type: Literal["dft"] = Field("dft", description="The algorithm")

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        return (LossConfig(divergence=DftLoss(), importance=ImportanceConfig(level="off")),)

    @property
    def label(self) -> str:
        return "dft on the demonstrations' own tokens"

    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        return demonstrated(group)
