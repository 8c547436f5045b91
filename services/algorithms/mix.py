"""Mix: a share of the samples has tokens of an expert, and the others are the student's own.

seed of a sample ─┬─► the student samples, the teacher scores                                   ─► divergence
                  └─► the share  ─┬─► demonstration: its tokens                                 ─► log-likelihood
                                  ├─► teacher: a completion of the teacher, which it scores     ─► divergence
                                  └─► prefix: the student goes on behind the demonstration's first tokens, and
                                      the teacher scores what the student sampled               ─► divergence
"""

import random
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from sdft.actors.shared.drafts import Draft
from sdft.actors.shared.types import IntArray
from sdft.learner.config import ImportanceConfig, LossConfig, Nll
from sdft.services.algorithms.base import Distillation, Group, Student, Teacher, awaits_engines_only
from sdft.services.base.section import Section, short_form

EXPERT = 1  # objective of tokens that the student did not sample


class OfDemonstration(Section):
    """The demonstration's tokens are trained as `sft` does."""

    type: Literal["demonstration"] = Field("demonstration", description="What a share of the samples is")


class OfTeacher(Section):
    """A completion of the teacher is trained as `off_policy` does."""

    type: Literal["teacher"] = Field("teacher", description="What a share of the samples is")


class OfPrefix(Section):
    """The student goes on behind the first tokens of the demonstration. Only its own tokens are in the loss."""

    type: Literal["prefix"] = Field("prefix", description="What a share of the samples is")
    tokens: int = Field(16, ge=1, description="Tokens of the demonstration that the student goes on behind, at most")


Expert = Annotated[
    Annotated[OfDemonstration | OfTeacher | OfPrefix, Field(discriminator="type")],
    BeforeValidator(short_form("demonstration")),
]


class Mix(Distillation):
    """Distillation on the student's samples, a share of which has an expert's tokens, or begins with them."""

    figure: ClassVar[str] = (
        "The {name} of the student's and the expert's tokens; the loss adds importance weights on the student's, "
        "and the options of method."
    )

    type: Literal["mix"] = Field("mix", description="The algorithm")
    share: float = Field(0.25, gt=0, lt=1, description="Share of the samples with tokens of the expert, on average")
    expert: Expert = Field(
        OfDemonstration(), description="Whose tokens these samples have: demonstration, teacher or prefix"
    )
    importance: ImportanceConfig = ImportanceConfig()

    @model_validator(mode="after")
    def _support_is_known(self) -> "Mix":
        support = self.divergence.scored
        if support.likely and isinstance(self.expert, OfTeacher):
            raise ValueError(
                f"divergence.support {support.of} is of the student's samples, and those of expert teacher are not; "
                f"set support: teacher or full"
            )
        return self

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        own, off = self.loss(self.importance), ImportanceConfig(level="off")
        if isinstance(self.expert, OfDemonstration):
            return own, LossConfig(divergence=Nll(), importance=off)
        return (own, self.loss(off)) if isinstance(self.expert, OfTeacher) else (own,)

    @property
    def label(self) -> str:
        whose = {"demonstration": "the demonstration", "teacher": "the teacher's", "prefix": "begun by demonstrations"}
        return f"{self.divergence.type} divergence, {self.share:.0%} of the samples {whose[self.expert.type]}"

    @property
    def trains_demonstrations(self) -> bool:
        return not isinstance(self.expert, OfTeacher)

    @property
    def prefix_tokens(self) -> int:
        return self.expert.tokens if isinstance(self.expert, OfPrefix) else 0

    @awaits_engines_only
    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        # Drawn from the seed of the sample: the same in each run, and when a batch is made again.
        mixed = [random.Random(seed).random() < self.share for seed in group.seeds]
        own, of_expert = _part(group, [not one for one in mixed]), _part(group, mixed)
        drafts = await self._sampled(own, student, teacher, self.skip_first) if own.samples else []
        return drafts + (await self._of_expert(of_expert, student, teacher) if of_expert.samples else [])

    async def _of_expert(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        if isinstance(self.expert, OfDemonstration):
            return [replace(draft, objective=EXPERT) for draft in group.demonstrated()]
        if isinstance(self.expert, OfPrefix):
            prefix = _beginning(group, self.expert.tokens)
            prompts = [np.concatenate([ids, prefix]) for ids in (group.student_ids, group.teacher_prompt)]
            begun = group._replace(student_ids=prompts[0], teacher_ids=prompts[1])
            return await self._sampled(begun, student, teacher, max(0, self.skip_first - len(prefix)))
        behind = [group.teacher_prompt] * len(group.samples)
        completed = await teacher.complete(behind, group.seeds)
        completions = [completion.not_by_student(group.step) for completion in completed]
        scores = await teacher.score(behind, completions, self.divergence.scored)
        return group.drafts(completions, scores, self.skip_first, EXPERT)

    async def _sampled(self, group: Group, student: Student, teacher: Teacher, skipped: int) -> list[Draft]:
        n = len(group.samples)
        completions = await student.complete([group.student_ids] * n, group.seeds)
        scores = await teacher.score([group.teacher_prompt] * n, completions, self.divergence.scored)
        return group.drafts(completions, scores, skipped)


def _part(group: Group, taken: list[bool]) -> Group:
    """Return the group with the samples that are taken."""
    samples = tuple(sample for sample, one in zip(group.samples, taken, strict=True) if one)
    return group._replace(samples=samples, seeds=tuple(s for s, one in zip(group.seeds, taken, strict=True) if one))


def _beginning(group: Group, tokens: int) -> IntArray:
    """Return the first tokens of the demonstration's first reply, without the token that ends it."""
    if group.demonstration_ids is None:
        raise ValueError(f"sample {group.samples[0]}: the row has no demonstration")
    mask = group.demonstration_mask
    first = len(group.demonstration_ids) if mask is None else int(np.argmin(mask))
    return group.demonstration_ids[: min(tokens, first - 1)]
