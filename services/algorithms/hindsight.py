"""Hindsight: the teacher sees what a user said next after an earlier reply to the same prompt.

    logged conversation ─► history, reply, the user's next message
    history ─► the student samples; history, reply and next message ─► the teacher scores the student's tokens

Learning from users' next messages (Kleine Buening et al. 2026, arXiv 2603.12273), with rollouts of the student.
"""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.services.algorithms.on_policy import OnPolicy


class Hindsight(OnPolicy):
    """Self-distillation from logged conversations: the teacher sees an earlier reply and the user's next message."""

    from_conversations: ClassVar[bool] = True
    learns_from: ClassVar[str] = "replies with what was said next"

    type: Literal["hindsight"] = Field("hindsight", description="The algorithm")

    @property
    def label(self) -> str:
        return f"from users' next messages, {self.divergence.type} divergence"
