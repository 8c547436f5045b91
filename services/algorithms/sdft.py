"""SDFT: the student samples, and the teacher, which sees the demonstration, scores (arXiv 2601.19897)."""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.services.algorithms.on_policy import OnPolicy


class Sdft(OnPolicy):
    """Self-distillation: rollouts of the student, pulled to the teacher, which sees the demonstration."""

    plays: ClassVar[bool] = True

    type: Literal["sdft"] = Field("sdft", description="The algorithm")

    @property
    def label(self) -> str:
        return f"{self.divergence.type} divergence"
