"""SFT: the negative log-likelihood of the demonstrations' tokens. No engine samples or scores."""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.actors.shared.drafts import Draft
from sdft.learner.config import Dft as DftLoss
from sdft.learner.config import ImportanceConfig, LossConfig, Nll
from sdft.services.algorithms.base import Algorithm, Group, Student, Teacher, awaits_engines_only


class OnDemonstrations(Algorithm):
    """Base class of algorithms that train the demonstrations' own tokens, without an engine."""

    student_samples: ClassVar[bool] = False
    teacher_scores: ClassVar[bool] = False
    divergence: ClassVar[Nll | DftLoss]

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        return (LossConfig(divergence=self.divergence, importance=ImportanceConfig(level="off")),)

    @property
    def trains_demonstrations(self) -> bool:
        return True

    @property
    def needs_context(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return f"{self.type} on the demonstrations' own tokens"

    @awaits_engines_only
    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        return group.demonstrated()


class Sft(OnDemonstrations):
    """Supervised fine-tuning on the demonstrations' tokens."""

    divergence: ClassVar[Nll | DftLoss] = Nll()
    figure: ClassVar[str] = "The {name} of the demonstrations' tokens, which is also the loss."

    type: Literal["sft"] = Field("sft", description="The algorithm")
