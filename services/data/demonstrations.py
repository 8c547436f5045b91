"""Load demonstrations and questions from files or the hub; every row is checked before any is used."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.services.base.errors import UserError
from sdft.services.base.files import existing_file, is_data_file, is_hub_name, near_names, resolve_path
from sdft.services.config.columns import Format
from sdft.services.config.data import DataConfig
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.data.conversations import answered, is_conversation
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
    teacher: str | None = None  # its name in teacher.models


def load_demonstrations(
    data: DataConfig, base: Path, needed: Iterable[str], teachers: Sequence[str] = ()
) -> list[Record]:
    """Load all rows of data.train, a file relative to the folder `base` or a hub name.

    teachers: names in teacher.models. UserError if a row is bad or lacks one of the `needed` columns.
    """
    return _load(data, base, needed, teachers, conversations=False)[0]


def load_conversations(
    data: DataConfig, base: Path, needed: Iterable[str], teachers: Sequence[str] = ()
) -> tuple[list[Record], int]:
    """Load data.train, whose rows may be logged conversations: a record for each reply that a user's message follows.

    Returns the records, and the number of conversations without such a reply. UserError as for demonstrations.
    """
    return _load(data, base, needed, teachers, conversations=True)


def _load(
    data: DataConfig, base: Path, needed: Iterable[str], teachers: Sequence[str], conversations: bool
) -> tuple[list[Record], int]:
    name = data.train
    if is_data_file(data.train) or resolve_path(base, data.train).exists() or not is_hub_name(data.train):
        rows = _file_rows("data.train", data.train, base)
        name = str(resolve_path(base, data.train))
    else:
        near = near_names(Path(data.train).name, resolve_path(base, data.train).parent)
        rows = hub_rows(data.train, data.split, f" (did you mean {near[0]}?)" if near else "")
    checker = RowChecker(name, ("prompt", *needed), format_=data.format, conversations=conversations, teachers=teachers)
    return _checked(renamed(rows, data.columns), checker)


def load_questions(
    s: EvaluationSet, base: Path, check: Callable[[Any], str | None], teachers: Sequence[str] = ()
) -> list[Record]:
    """Load the questions or texts of an evaluation set. `check` returns the problem of an answer. Raises UserError.

    teachers: names in teacher.models, of which a question may have one.
    """
    rows = _file_rows(f"evaluation.sets ({s.name}).file", s.file, base)
    needed = ("text",) if s.is_text else ("prompt", "answer")
    checker = RowChecker(str(resolve_path(base, s.file)), needed, check, teachers=teachers)
    return spread(_checked(renamed(rows, s.columns), checker)[0], s.rows)


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


class Unanswered(BadRow):
    """Of a conversation in which no user's message follows a reply."""

    __slots__ = ()


class RowChecker:
    """Checks the rows of one file or source and makes records of them. Two records of it have no id in common."""

    def __init__(
        self,
        name: str,
        required: tuple[str, ...],
        check_answer: Callable[[Any], str | None] = lambda answer: None,
        format_: Format | None = None,
        conversations: bool = False,
        teachers: Sequence[str] = (),
    ) -> None:
        """name: of the file, for messages. required: columns; "a|b" means one of both.

        check_answer() returns the problem of an answer.

        format_: data.format; None: of a file that always has the format messages.

        conversations: rows may be logged conversations, of which each reply that a user's message follows is a record.

        teachers: names in teacher.models; without them the column teacher is not read.
        """
        self.name, self.required = name, required
        self._check_answer, self._format, self._conversations = check_answer, format_, conversations
        self._teachers = teachers
        self._line_of_id: dict[str, int] = {}

    def check(self, line: int, given: dict[str, Any] | BadRow) -> list[Record] | BadRow:
        """Return the records of a row, or all that is wrong with the row. Only a conversation has several records."""
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
        if not (self._conversations and is_conversation(row)):
            found = self._record(row, as_given, _id_of(line, row), f"{self.name}:{line}")
            return found if isinstance(found, BadRow) else [found]
        try:
            rows = list(answered(row, called.get("prompt", "prompt")))
        except Unusable as problem:
            return BadRow(str(problem))
        if not rows:
            return Unanswered("no user's message follows a reply, and there is no column feedback; add one of them")
        records = []
        for number, one in rows:
            found = self._record(one, as_given, f"{_id_of(line, row)}/{number}", f"{self.name}:{line} message {number}")
            if isinstance(found, BadRow):
                return found
            records.append(found)
        return records

    def _record(self, row: dict[str, Any], given: Given, row_id: str, where: str) -> Record | BadRow:
        values, problems = read_row(row, self.required, self._check_answer, given, self._teachers)
        if row_id in self._line_of_id and not any(p.startswith("id ") for p in problems):
            problems.append(
                f'id "{row_id}" is already used in {self.name}:{self._line_of_id[row_id]}; change one of them'
            )
        if problems:
            return BadRow("; ".join(problems))
        return Record(**values | {"id": row_id, "where": where})

    def accept(self, record: Record, line: int) -> None:
        """Keep the id of a record that is used: a later row with the same id is bad."""
        self._line_of_id.setdefault(record.id, line)


def _named(checker: RowChecker) -> str:
    return " and ".join(columns.replace("|", " or ") for columns in checker.required)


def _id_of(line: int, row: dict[str, Any]) -> str:
    given = row.get("id")
    return f"row-{line}" if given is None else str(given)


def _checked(rows: Iterable[NumberedRow], checker: RowChecker) -> tuple[list[Record], int]:
    """Check the rows; one UserError lists all bad rows, up to MAX_REPORTED.

    Returns the records, and the number of conversations that have none.
    """
    good: list[Record] = []
    bad: list[str] = []
    unanswered = 0
    for line, row in rows:
        records = checker.check(line, row)
        if isinstance(records, Unanswered):
            unanswered += 1
        elif isinstance(records, BadRow):
            bad.append(f"{checker.name}:{line}: {records}")
        else:
            for record in records:
                checker.accept(record, line)
            good += records
    if bad:
        if len(bad) > MAX_REPORTED:
            bad[MAX_REPORTED:] = [f"… and {len(bad) - MAX_REPORTED} more"]
        raise UserError("\n".join(bad))
    if unanswered and not good:
        raise UserError(
            f"{checker.name}: in none of the {unanswered} conversations a user's message follows a reply, and no row "
            f"has the column feedback; add one of them"
        )
    if not good:
        raise UserError(f"{checker.name}: there are no rows; give at least one with {_named(checker)}")
    return good, unanswered
