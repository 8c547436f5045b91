"""The prompts of one record as token ids: what student and teacher see, and the demonstration as a reply."""

import json
from dataclasses import dataclass

import numpy as np

from sdft.actors.shared.sequences import BoolArray
from sdft.actors.shared.types import IntArray


@dataclass(frozen=True)
class PromptPair:
    """Token ids of one record's prompts; both end where the assistant's reply begins."""

    student_ids: IntArray  # [P]
    teacher_ids: IntArray | None  # [P]; None: the record has nothing for a teacher
    demonstration_ids: IntArray | None = None  # [T], as a reply, with the token that ends it
    demonstration_mask: BoolArray | None = None  # [T], which of them the assistant writes; None: all
    route: str = ""  # name of the record's teacher in teacher.models; "": the run's only one, or none

    @classmethod
    def of(
        cls,
        student: list[int],
        teacher: list[int] | None,
        demonstration: list[int] | None = None,
        mask: list[bool] | None = None,
        route: str = "",
    ) -> "PromptPair":
        """Make a pair of a tokenizer's lists. Arrays take a ninth of their memory."""
        return cls(
            np.asarray(student, np.int32),
            None if teacher is None else np.asarray(teacher, np.int32),
            None if demonstration is None else np.asarray(demonstration, np.int32),
            None if mask is None else np.asarray(mask, np.bool_),
            route,
        )

    @property
    def parts(self) -> tuple[IntArray | None, ...]:
        """The token ids."""
        return self.student_ids, self.teacher_ids, self.demonstration_ids

    @property
    def encoded(self) -> bytes:
        """The token ids, and the route if there is one, as JSON for digests."""
        ids = [None if ids is None else ids.tolist() for ids in self.parts]
        return json.dumps([*ids, self.route] if self.route else ids).encode()
