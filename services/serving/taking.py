"""Checks of the records that come over HTTP: those of a run's file, with the service's template and its limits.

rows as they came ─► checked ─► rows in our columns, which is what the inbox keeps
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sdft.services.base.errors import UserError
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record, RowChecker
from sdft.services.data.prompts import build_prompts
from sdft.services.data.rows import BadRow
from sdft.services.planning.prepare import prompt_builder
from sdft.services.planning.prepared import Prepared
from sdft.services.planning.sources import needed_columns

OPTIONAL = ("demonstration", "context", "feedback", "answer", "tools")


@dataclass
class Taken:
    """Rows that were checked. problems: what is wrong, as {"row": number from 1, "message": ...}."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)


class RecordChecks:
    """Checks rows."""

    def __init__(self, prepared: Prepared) -> None:
        """prepared: of the service's configuration."""
        self._task = prepared.stages[0].config
        self._base = prepared.path.parent
        self._builder: PromptBuilder = prompt_builder(self._task, prepared.tokenizer, self._base, prepared.begun)
        self.required = ("prompt", *needed_columns(self._task, self._base))

    def check(self, rows: Sequence[Any], name: str) -> Taken:
        """Check rows. name: of where they come from, for messages."""
        taken = Taken()
        for number, row in enumerate(rows, start=1):
            try:
                taken.rows += self._in_our_columns(number, row, name)
            except UserError as error:
                taken.problems.append({"row": number, "message": str(error)})
        return taken

    def _in_our_columns(self, number: int, row: Any, name: str) -> list[dict[str, Any]]:
        """Return the rows that are kept of a row. UserError says what is wrong with it."""
        if not isinstance(row, dict):
            raise UserError("the row is not an object; send one JSON object for each record")
        logs = self._task.method.from_conversations
        records = RowChecker(name, self.required, format_="messages", conversations=logs).check(number, row)
        if isinstance(records, BadRow):
            raise UserError(str(records))
        data = self._task.data
        reply = self._task.sampling.max_new_tokens if self._task.method.trains_demonstrations else None
        try:
            build_prompts(self._builder, records, data.max_prompt_tokens, data.max_teacher_prompt_tokens, reply)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{records[0].where}: ")) from None
        return [kept_row(record) | ({"given_id": record.id} if "id" in row else {}) for record in records]


def kept_row(record: Record) -> dict[str, Any]:
    """Return a record as a row in our columns."""
    kept = {name: value for name in OPTIONAL if (value := getattr(record, name)) is not None}
    return {"prompt": [dict(message) for message in record.messages]} | kept
