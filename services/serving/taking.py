"""Checks of the records that come over HTTP: those of a run's file, with the service's template and its limits."""

from collections.abc import Sequence
from typing import Any

from sdft.services.base.errors import UserError
from sdft.services.data.contexts import PromptBuilder, shown_to_teacher
from sdft.services.data.demonstrations import Record, RowChecker
from sdft.services.data.prompts import build_prompts
from sdft.services.data.rows import BadRow
from sdft.services.planning.prepare import prompt_builder
from sdft.services.planning.prepared import Prepared

MOST_PROBLEMS = 20  # in one answer


class RecordChecks:
    """Says what is wrong with rows."""

    def __init__(self, prepared: Prepared) -> None:
        """prepared: of the service's configuration."""
        self._task = prepared.stages[0].config
        self._base = prepared.path.parent
        self._builder: PromptBuilder = prompt_builder(self._task, prepared.tokenizer, self._base, prepared.begun)
        column = shown_to_teacher(self._task.data.template, self._base)
        trained = self._task.method.trains_demonstrations
        needed = ["demonstration"] if trained else [column] if column is not None else []
        self.required = ("prompt", *needed)

    def problems(self, rows: Sequence[Any], name: str) -> list[dict[str, Any]]:
        """Return what is wrong, as {"row": number from 1, "message": ...}; [] if every row can be trained."""
        found: list[dict[str, Any]] = []
        for number, row in enumerate(rows, start=1):
            problem = self._problem(number, row, name)
            if problem is not None:
                found.append({"row": number, "message": problem})
        return found

    def _problem(self, number: int, row: Any, name: str) -> str | None:
        if not isinstance(row, dict):
            return "the row is not an object; send one JSON object for each record"
        record = RowChecker(name, self.required, format_="messages").check(number, row)
        if isinstance(record, BadRow):
            return str(record)
        data = self._task.data
        reply = self._task.sampling.max_new_tokens if self._task.method.trains_demonstrations else None
        try:
            build_prompts(self._builder, [record], data.max_prompt_tokens, data.max_teacher_prompt_tokens, reply)
        except UserError as error:
            return _without_place(str(error), record)
        return None


def _without_place(text: str, record: Record) -> str:
    return text.removeprefix(f"{record.where}: ")
