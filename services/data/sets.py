"""An evaluation set with its questions and their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdft.actors.shared.types import IntArray
from sdft.services.config.environment import EnvironmentConfig
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.pairs import PromptPair
from sdft.services.data.record_contexts import RecordContexts
from sdft.services.records.rows import STUDENT_ACCURACY


@dataclass(frozen=True)
class LoadedSet:
    """An evaluation set with its questions and their prompts, in file order."""

    settings: EvaluationSet
    questions: Sequence[Record]
    prompts: Sequence[PromptPair]
    builder: PromptBuilder | None = None  # of the prompts; None: of texts
    environment: EnvironmentConfig | None = None  # with grader environment

    def contexts(self, index: int) -> RecordContexts:
        """Return what builds the further tokens of a question's episode."""
        assert self.builder is not None
        return RecordContexts(self.builder, self.questions[index], 0)

    @property
    def has_teacher(self) -> bool:
        """Whether every question has a teacher prompt that differs from the student's."""
        return all(p.teacher_ids is not None and not np.array_equal(p.teacher_ids, p.student_ids) for p in self.prompts)

    @property
    def has_prompts(self) -> bool:
        """Whether every question has a teacher prompt."""
        return not self.settings.is_text and all(p.teacher_ids is not None for p in self.prompts)

    @property
    def routes(self) -> list[str]:
        """The name of each question's teacher in teacher.models; "" without one."""
        return [p.route for p in self.prompts]

    def of_route(self, route: str) -> "LoadedSet":
        """Return the set with the questions of one teacher only."""
        pairs = [(q, p) for q, p in zip(self.questions, self.prompts, strict=True) if p.route == route]
        return replace(self, questions=[q for q, _ in pairs], prompts=[p for _, p in pairs])

    def prompts_of(self, metric: str) -> list[IntArray]:
        """Return the prompts for the metric STUDENT_ACCURACY or TEACHER_ACCURACY."""
        if metric == STUDENT_ACCURACY:
            return [p.student_ids for p in self.prompts]
        return [p.teacher_ids for p in self.prompts if p.teacher_ids is not None]
