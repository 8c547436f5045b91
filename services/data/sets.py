"""An evaluation set with its questions and their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

from sdft.services.config.sections import EvaluationSet
from sdft.services.data.contexts import PromptPair
from sdft.services.data.demonstrations import Record
from sdft.services.records.rows import STUDENT_ACCURACY


@dataclass(frozen=True)
class LoadedSet:
    """An evaluation set with its questions and their prompts, in file order."""

    settings: EvaluationSet
    questions: Sequence[Record]
    prompts: Sequence[PromptPair]

    @property
    def has_teacher(self) -> bool:
        """Whether every question has a teacher prompt that differs from the student's."""
        return all(p.teacher_ids not in (None, p.student_ids) for p in self.prompts)

    def prompts_of(self, metric: str) -> list[list[int] | None]:
        """Return the prompts, as token ids, for the metric STUDENT_ACCURACY or TEACHER_ACCURACY."""
        return [p.student_ids if metric == STUDENT_ACCURACY else p.teacher_ids for p in self.prompts]
