"""Texts and prompts of one record that are built while the run goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdft.actors.shared.types import IntArray
from sdft.services.base.errors import PromptTooLong, UserError
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record


@dataclass(frozen=True)
class RecordContexts:
    """The texts and prompts of one record that are built while the run goes on (algorithms/base.py)."""

    builder: PromptBuilder
    record: Record
    limit: int  # data.max_teacher_prompt_tokens

    def teacher(self, **columns: Any) -> IntArray:
        """Return the teacher's prompt [P], with these values in place of the record's columns."""
        ids = self.builder.teacher(replace(self.record, **columns))
        if ids is None:
            raise UserError(
                f"{self.record.where}: the teacher's prompt needs a column that this row lacks and that the algorithm "
                f"did not give; add the column to the row, or choose another data.template"
            )
        if len(ids) > self.limit:
            raise PromptTooLong(
                f"{self.record.where}: a teacher's prompt that was made during the run has {len(ids)} tokens, but "
                f"data.max_teacher_prompt_tokens is {self.limit}; raise it to at least {len(ids)}"
            )
        return np.asarray(ids, dtype=np.int32)

    def text(self, ids: IntArray) -> str:
        """Return the text of a completion [T], without the token that ends it."""
        return self.builder.text(ids.tolist())

    def reply(self, ids: IntArray) -> str:
        """Return a completion [T] as an environment or a grader reads it: with marks, without its last token."""
        return self.builder.reply(self.record, ids.tolist())

    def between(self, messages: Sequence[Mapping[str, Any]]) -> IntArray:
        """Return the tokens [C] between the end of a reply and the next one, with these messages there."""
        return np.asarray(self.builder.between(self.record, messages), dtype=np.int32)

    @property
    def row(self) -> dict[str, Any]:
        """The columns of the record, for an environment."""
        r = self.record
        columns = {name: getattr(r, name) for name in ("id", "answer", "context", "feedback", "demonstration", "tools")}
        return columns | {"prompt": [dict(message) for message in r.messages]}
