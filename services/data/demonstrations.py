"""Load demonstrations and questions from files or the hub; every row is checked before any is used."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from sdft.services.base.errors import UserError
from sdft.services.base.files import existing_file, is_data_file, is_hub_name, near_names, resolve_path
from sdft.services.config.sections import COLUMNS, DataConfig, EvaluationSet
from sdft.services.data.rows import BadRow, NumberedRow, hub_rows, json_kind, jsonl_rows, parquet_rows, renamed

MAX_REPORTED = 20
ROLES = ("system", "user", "assistant")
# Columns that change the prompt or hold part of the reply, and that no code here reads. Rows that have them are
# refused, because the run would train on a different question. Other columns (ids, sources) are ignored.
REFUSED = (
    *("system", "system_prompt", "input", "history", "documents", "chat_template_kwargs"),
    *("tools", "functions", "tool_calls", "function_call", "reasoning_content"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
# Members of a message that are ignored (weight: whether the message is trained on; messages of a prompt never are).
# All others except role and content are refused: templates read tool_calls, reasoning_content, name and more.
HARMLESS = ("id", "message_id", "created", "created_at", "timestamp", "model", "metadata", "weight")
# difflib ratio from which an unknown column counts as a typo of an optional one: contexts does, content does not.
NEAR_OPTIONAL = 0.86
EMPTY: tuple[Any, ...] = (None, False, "", [], {})  # values of an empty column or member


class Message(TypedDict):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Record:
    """One row: a prompt with an expert's reply (or other knowledge about it) and the answer for a grader; or a text."""

    id: str
    messages: tuple[Message, ...]  # the last one is the user's; empty for a text
    demonstration: str | None
    context: str | None
    feedback: str | None
    answer: Any
    where: str  # "file:line", for errors
    text: str | None = None  # instead of a prompt; scored as it is


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
    return _checked(name, renamed(rows, data.columns), ("prompt", *needed), lambda answer: None)


def load_questions(s: EvaluationSet, base: Path, check: Callable[[Any], str | None]) -> list[Record]:
    """Load the questions or texts of an evaluation set. `check` returns the problem of an answer. Raises UserError."""
    rows = _file_rows(f"evaluation.sets ({s.name}).file", s.file, base)
    needed = ("text",) if s.is_text else ("prompt", "answer")
    all_of_them = _checked(str(resolve_path(base, s.file)), renamed(rows, s.columns), needed, check)
    return spread(all_of_them, s.rows)


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
        self, name: str, required: tuple[str, ...], check_answer: Callable[[Any], str | None] = lambda answer: None
    ) -> None:
        """name: of the file, for messages. check_answer() returns the problem of an answer."""
        self.name = name
        self._required, self._check_answer = required, check_answer
        self._line_of_id: dict[str, int] = {}

    def check(self, line: int, given: dict[str, Any] | BadRow) -> Record | BadRow:
        """Return the record of a row, or all that is wrong with the row."""
        if isinstance(given, BadRow):
            return given
        row = _without_blanks(given, self._required)
        problems = list(_problems(row, self._required, self._check_answer))
        row_id = _id_of(line, row)
        if row_id in self._line_of_id and not any(p.startswith("id ") for p in problems):
            problems.append(
                f'id "{row_id}" is already used in {self.name}:{self._line_of_id[row_id]}; change one of them'
            )
        if problems:
            return BadRow("; ".join(problems))
        columns = {column: row.get(column) for column in ("demonstration", "context", "feedback", "answer", "text")}
        messages = _messages(row["prompt"]) if "prompt" in self._required else ()
        return Record(id=row_id, messages=messages, where=f"{self.name}:{line}", **columns)

    def accept(self, record: Record, line: int) -> None:
        """Keep the id of a record that is used: a later row with the same id is bad."""
        self._line_of_id.setdefault(record.id, line)


def _id_of(line: int, row: dict[str, Any]) -> str:
    given = row.get("id")
    return f"row-{line}" if given is None else str(given)


def _checked(
    name: str, rows: Iterable[NumberedRow], required: tuple[str, ...], check_answer: Callable[[Any], str | None]
) -> list[Record]:
    """Check the rows; one UserError lists all bad rows, up to MAX_REPORTED."""
    good: list[Record] = []
    bad: list[str] = []
    checker = RowChecker(name, required, check_answer)
    for line, row in rows:
        record = checker.check(line, row)
        if isinstance(record, BadRow):
            bad.append(f"{name}:{line}: {record}")
        else:
            checker.accept(record, line)
            good.append(record)
    if bad:
        if len(bad) > MAX_REPORTED:
            bad[MAX_REPORTED:] = [f"… and {len(bad) - MAX_REPORTED} more"]
        raise UserError("\n".join(bad))
    if not good:
        raise UserError(f"{name}: there are no rows; give at least one with {' and '.join(required)}")
    return good


def _without_blanks(row: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    """Replace blank text in optional columns by null: some data sets use it for a missing value."""
    optional = {column: row.get(column) for column in COLUMNS if column not in required}
    return row | {column: None for column, v in optional.items() if isinstance(v, str) and not v.strip()}


def _problems(
    row: dict[str, Any], required: tuple[str, ...], check_answer: Callable[[Any], str | None]
) -> Iterable[str]:
    """Yield every problem of a row; each one begins with the column's name."""
    for column in COLUMNS:
        if column == "text" and column not in required:
            continue  # a common column name, ignored unless it is required
        value = row.get(column)
        if value is None:
            near = _near_column(column, row, column in required)
            if near:
                yield f"{column} is missing, but there is {near}; did you mean {column}?"
            elif column in required:
                has = ", ".join(row) or "no columns"
                yield f"{column} is null" if column in row else f"{column} is missing (the row has {has})"
        elif column == "prompt":
            yield from _prompt_problems(value)
        elif column == "answer":
            problem = _bad_text_within(value)
            reason = f"answer {problem}" if problem else check_answer(value)
            if reason:
                yield reason if reason.startswith("answer") else f"answer: {reason}"
        elif column == "id" and type(value) is int:
            pass
        else:
            problem = _text_problem(value, "text or a whole number" if column == "id" else "text")
            if problem:
                yield f"{column} {problem}"
    if "prompt" in required:
        for name in REFUSED:
            if row.get(name) not in EMPTY:
                yield f"{name} is not used, although it may change the question; write it into the prompt, or remove it"


def _near_column(column: str, row: dict[str, Any], required: bool) -> str | None:
    """Return a column of the row that is probably a typo of `column`."""
    # id is too short: idx and uid are columns of their own. answer is only read where replies are graded.
    if column in row or column == "id" or (column == "answer" and not required):
        return None
    others = [str(name) for name in row if name not in COLUMNS]
    near = difflib.get_close_matches(column, others, n=1, cutoff=0.6 if required else NEAR_OPTIONAL)
    return near[0] if near else None


def _prompt_problems(prompt: Any) -> Iterable[str]:
    if not isinstance(prompt, list):
        problem = _text_problem(prompt, "text or a list of messages")
        if problem:
            yield f"prompt {problem}"
        return
    if not prompt:
        yield "prompt is an empty list"
        return
    for number, message in enumerate(prompt, start=1):
        at = f"prompt message {number}"
        if not isinstance(message, dict):
            yield f"{at} must be an object with role and content, not {json_kind(message)}"
            return
        if message.get("role") not in ROLES:
            yield f"{at}: role must be one of {', '.join(ROLES)}, not {message.get('role')!r}"
        problem = _text_problem(message.get("content"))
        if problem:
            yield f"{at}: content {problem}"
        for name, value in message.items():
            if name not in ("role", "content", *HARMLESS) and value not in EMPTY:
                yield f"{at}: {name} is not used, only role and content are; write it into the content, or remove it"
    if prompt[-1].get("role") in ("system", "assistant"):
        yield f"prompt: the last message must be the user's, not the {prompt[-1]['role']}'s"


def _text_problem(value: Any, expected: str = "text") -> str | None:
    if not isinstance(value, str):
        return "is null" if value is None else f"must be {expected}, not {json_kind(value)}"
    if not value.strip():
        return "is empty"
    return _bad_text_within(value)


def _bad_text_within(value: Any) -> str | None:
    """Return the problem with the characters of a text, or of any text in a list or object."""
    pending = [value]  # iterative: JSON may be nested deeper than the recursion limit
    while pending:
        inner = pending.pop()
        if isinstance(inner, dict):
            pending += [*inner, *inner.values()]
        elif isinstance(inner, list):
            pending += inner
        elif isinstance(inner, str) and "\0" in inner:
            return "holds a NUL character; remove it"
        elif isinstance(inner, str) and any("\ud800" <= c <= "\udfff" for c in inner):
            return "holds half a surrogate pair, which is not a character; remove it"
    return None


def _messages(prompt: str | list[dict[str, Any]]) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    return tuple(Message(role=m["role"], content=m["content"]) for m in prompt)
