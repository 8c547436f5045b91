"""Load demonstrations and questions from files or the hub; every row is checked before any is used."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.services.base.errors import UserError
from sdft.services.base.files import existing_file, is_data_file, is_hub_name, near_names, resolve_path
from sdft.services.config.columns import Format
from sdft.services.config.sections import DataConfig, EvaluationSet
from sdft.services.data.formats import in_our_columns
from sdft.services.data.messages import Message
from sdft.services.data.reading import Given, read_row, without_blanks
from sdft.services.data.rows import BadRow, NumberedRow, hub_rows, jsonl_rows, parquet_rows, renamed
from sdft.services.data.values import Unusable

MAX_REPORTED = 20


@dataclass(frozen=True)
class Record:
    """One row: a prompt with an expert's reply (or other knowledge about it) and the answer for a grader; or a text."""

    id: str
    messages: tuple[Message, ...]  # the last one is the user's or a tool's; empty for a text
    demonstration: str | Message | tuple[Message, ...] | None  # a message if it has tool calls; several turns
    context: str | None
    feedback: str | None
    answer: Any
    where: str  # "file:line", for errors
    text: str | None = None  # instead of a prompt; scored as it is
    tools: list[dict[str, Any]] | None = None  # definitions, for the chat template


def load_demonstrations(data: DataConfig, base: Path, needed: Iterable[str]) -> list[Record]:
    """Load all rows of data.train, a file relative to the folder `base` or a hub name.

    UserError if a row is bad or lacks one of the `needed` columns.
    """
    name = data.train
    if is_data_file(data.train) or resolve_path(base, data.train).exists() or not is_hub_name(data.train):
        rows = _file_rows("data.train", data.train, base)
        name = str(resolve_path(base, data.train))
    else:
        near = near_names(Path(data.train).name, resolve_path(base, data.train).parent)
        rows = hub_rows(data.train, data.split, f" (did you mean {near[0]}?)" if near else "")
    return _checked(renamed(rows, data.columns), RowChecker(name, ("prompt", *needed), format_=data.format))


def load_questions(s: EvaluationSet, base: Path, check: Callable[[Any], str | None]) -> list[Record]:
    """Load the questions or texts of an evaluation set. `check` returns the problem of an answer. Raises UserError."""
    rows = _file_rows(f"evaluation.sets ({s.name}).file", s.file, base)
    needed = ("text",) if s.is_text else ("prompt", "answer")
    checker = RowChecker(str(resolve_path(base, s.file)), needed, check)
    return spread(_checked(renamed(rows, s.columns), checker), s.rows)


def spread(records: list[Record], count: int | None) -> list[Record]:
    """Return so many records, spread evenly over the given ones; all of them for None or more than there are."""
    if count is None or count >= len(records):
        return records
    return [records[i * len(records) // count] for i in range(count)]


def _file_rows(key: str, value: str, base: Path) -> Iterable[NumberedRow]:
    path = existing_file(key, value, base)
    if not is_data_file(value):
        raise UserError(f"{key}: {path} must be a .jsonl or .parquet file")
    return parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path)


class RowChecker:
    """Checks the rows of one file or source and makes records of them. Two records of it have no id in common."""

    def __init__(
        self,
        name: str,
        required: tuple[str, ...],
        check_answer: Callable[[Any], str | None] = lambda answer: None,
        format_: Format | None = None,
    ) -> None:
        """name: of the file, for messages. required: columns; "a|b" means one of both.

        check_answer() returns the problem of an answer.

        format_: data.format; None: of a file that always has the format messages.
        """
        self.name, self.required = name, required
        self._check_answer, self._format = check_answer, format_
        self._line_of_id: dict[str, int] = {}

    def check(self, line: int, given: dict[str, Any] | BadRow) -> Record | BadRow:
        """Return the record of a row, or all that is wrong with the row."""
        if isinstance(given, BadRow):
            return given
        row, called = given, dict[str, str]()
        if "prompt" in self.required:
            try:
                row, called = in_our_columns(self._format or "messages", given)
            except Unusable as problem:
                return BadRow(str(problem))
        row = without_blanks(row, self.required)
        as_given = Given(tuple(given), called, self._format is not None)
        values, problems = read_row(row, self.required, self._check_answer, as_given)
        row_id = _id_of(line, row)
        if row_id in self._line_of_id and not any(p.startswith("id ") for p in problems):
            problems.append(
                f'id "{row_id}" is already used in {self.name}:{self._line_of_id[row_id]}; change one of them'
            )
        if problems:
            return BadRow("; ".join(problems))
        return Record(**values | {"id": row_id, "where": f"{self.name}:{line}"})

    def accept(self, record: Record, line: int) -> None:
        """Keep the id of a record that is used: a later row with the same id is bad."""
        self._line_of_id.setdefault(record.id, line)


def _named(checker: RowChecker) -> str:
    return " and ".join(columns.replace("|", " or ") for columns in checker.required)


def _id_of(line: int, row: dict[str, Any]) -> str:
    given = row.get("id")
    return f"row-{line}" if given is None else str(given)


def _checked(rows: Iterable[NumberedRow], checker: RowChecker) -> list[Record]:
    """Check the rows; one UserError lists all bad rows, up to MAX_REPORTED."""
    good: list[Record] = []
    bad: list[str] = []
    for line, row in rows:
        record = checker.check(line, row)
        if isinstance(record, BadRow):
            bad.append(f"{checker.name}:{line}: {record}")
        else:
            checker.accept(record, line)
            good.append(record)
    if bad:
        if len(bad) > MAX_REPORTED:
            bad[MAX_REPORTED:] = [f"… and {len(bad) - MAX_REPORTED} more"]
        raise UserError("\n".join(bad))
    if not good:
        raise UserError(f"{checker.name}: there are no rows; give at least one with {_named(checker)}")
    return good
