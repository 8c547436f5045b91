"""SFT with on-policy recall: demonstrations are learnt by SFT, and the base model is recalled on general prompts.

    row of data.train         ─► the demonstration's tokens                             ─► negative log-likelihood
    row of method.prompts     ─► the student samples, the base model scores             ─► divergence to the base model

Both are in one schedule, so a batch has them in the proportion of their rows.
"""

from typing import ClassVar, Literal

from pydantic import Field

from sdft.actors.shared.drafts import Draft
from sdft.learner.config import ImportanceConfig, LossConfig, Nll
from sdft.services.algorithms.base import Distillation, Group, Student, Teacher, awaits_engines_only

RECALL = 1  # objective of the recalled prompts


class Recall(Distillation):
    """SFT on the demonstrations, with recall of the base model on the student's own samples for general prompts."""

    teacher_weights: ClassVar[tuple[str, ...]] = ("base", "external")
    files: ClassVar[tuple[str, ...]] = ("prompts",)
    figure: ClassVar[str] = (
        "The {name}: the first of the demonstrations' tokens, the second of base model and student on the student's "
        "tokens."
    )

    type: Literal["recall"] = Field("recall", description="The algorithm")
    prompts: str = Field(description="A .jsonl or .parquet file of general prompts, relative to the config file")
    rows: int | None = Field(None, ge=1, description="Number of these prompts, spread evenly over the file; null: all")
    skip_first: int = Field(0, ge=0, description="Tokens at the start of a completion that are left out of the loss")
    importance: ImportanceConfig = ImportanceConfig()

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        demonstrations = LossConfig(divergence=Nll(), importance=ImportanceConfig(level="off"))
        return demonstrations, self.loss(self.importance)

    @property
    def trains_demonstrations(self) -> bool:
        return True

    @property
    def needs_context(self) -> bool:
        return False

    @property
    def recalled(self) -> tuple[str, int | None]:
        return self.prompts, self.rows

    @property
    def label(self) -> str:
        return f"sft on the demonstrations, {self.divergence.type} divergence to the base model on general prompts"

    @awaits_engines_only
    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        if group.demonstration_ids is not None:
            return group.demonstrated()
        prompts = [group.student_ids] * len(group.samples)
        completions = await student.complete(prompts, group.seeds)
        scores = await teacher.score(prompts, completions, self.divergence.scored)
        return group.drafts(completions, scores, self.skip_first, RECALL)
