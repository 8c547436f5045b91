"""Demonstrations and questions from files or the hub: every row is checked before any is used."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from services.config import DataConfig, EvaluationSet, resolve_path
from services.errors import UserError
from services.files import existing_file, is_data_file
from services.graders import GRADERS
from services.rows import Row, hub_rows, jsonl_rows, parquet_rows

MAX_REPORTED = 20
ROLES = ("system", "user", "assistant")
FIELDS = ("prompt", "demonstration", "id", "context", "answer")


class Message(TypedDict):
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True)
class Demonstration:
    """A prompt with an expert's response to it."""

    id: str
    messages: tuple[Message, ...]  # the last one is the user's
    demonstration: str
    context: str | None
    answer: Any
    where: str  # "file:line", for messages about it


@dataclass(frozen=True)
class Question:
    """A prompt with the answer a grader expects; a demonstration only where the teacher is to be measured too."""

    id: str
    messages: tuple[Message, ...]
    demonstration: str | None
    context: str | None
    answer: Any
    where: str


def load_demonstrations(data: DataConfig, base: Path) -> list[Demonstration]:
    """All demonstrations, in file order. UserError lists every bad row, up to 20."""

    def check(row: dict[str, Any]) -> str | None:
        return _text_problem(row, "demonstration", required=True)

    return [
        Demonstration(
            str(row["id"]), _messages(row), row["demonstration"], row.get("context"), row.get("answer"), where
        )
        for where, row in _checked(_rows("data.train", data.train, data.split, base), check)
    ]


def load_questions(settings: EvaluationSet, base: Path) -> list[Question]:
    """All questions of an evaluation set, in file order, with answers its grader can use."""
    grader = GRADERS[settings.grader]

    def check(row: dict[str, Any]) -> str | None:
        if row.get("answer") is None:
            return f"answer is missing{_near('answer', row)}"
        return _text_problem(row, "demonstration", required=False) or grader.check_answer(row["answer"])

    return [
        Question(str(row["id"]), _messages(row), row.get("demonstration"), row.get("context"), row["answer"], where)
        for where, row in _checked(_rows(f"evaluation.sets ({settings.name})", settings.file, "test", base), check)
    ]


def _rows(key: str, name: str, split: str, base: Path) -> Iterable[Row]:
    if not is_data_file(name) and not resolve_path(base, name).exists():
        return hub_rows(name, split)
    path = existing_file(key, name, base)
    return parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path)


def _checked(rows: Iterable[Row], check: Callable[[dict[str, Any]], str | None]) -> list[tuple[str, dict[str, Any]]]:
    """Rows that are right, each with an id; UserError if any is not, or there is none."""
    good: list[tuple[str, dict[str, Any]]] = []
    bad: list[str] = []
    seen: dict[str, str] = {}
    for row in rows:
        problem = row.error or _problem(row.value) or check(row.value)
        if problem is None:
            value = dict(row.value)
            value["id"] = f"row-{row.number}" if value.get("id") is None else value["id"]
            first = seen.setdefault(str(value["id"]), row.where)
            if first != row.where:
                problem = f"id {value['id']!r} stands already at {first}"
            good.append((row.where, value))
        if problem is not None:
            bad.append(f"{row.where}: {problem}")
    if bad:
        more = [f"… and {len(bad) - MAX_REPORTED} more"] if len(bad) > MAX_REPORTED else []
        raise UserError("\n".join([*bad[:MAX_REPORTED], *more, "mend or remove these rows; nothing was started"]))
    if not good:
        raise UserError("the data has no rows: write one JSON object a line with at least prompt and demonstration")
    return good


def _problem(value: Any) -> str | None:
    if not isinstance(value, dict):
        return f"is not an object with prompt and demonstration, but {type(value).__name__}"
    prompt = value.get("prompt")
    if prompt is None:
        return f"prompt is missing{_near('prompt', value)}"
    if isinstance(prompt, str):
        problem = _string_problem(prompt, "prompt")
    elif isinstance(prompt, list):
        problem = _messages_problem(prompt)
    else:
        problem = f"prompt must be text or a list of chat messages, not {type(prompt).__name__}"
    if problem:
        return problem
    identity = value.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        return f"id must be text or a whole number, not {type(identity).__name__}"
    return _text_problem(value, "context", required=False)


def _messages_problem(messages: list[Any]) -> str | None:
    if not messages:
        return "prompt is an empty list of messages"
    for i, message in enumerate(messages):
        name = f"prompt message {i + 1}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f"{name} must be an object with role and content"
        if message["role"] not in ROLES:
            return f"{name} has the role {message['role']!r}; roles are {', '.join(ROLES)}"
        if not isinstance(message["content"], str):
            return f"{name} has content that is not text"
        if problem := _string_problem(message["content"], f"{name}'s content"):
            return problem
    if messages[-1]["role"] != "user":
        return f"the last prompt message must be the user's, not the {messages[-1]['role']}'s"
    return None


def _text_problem(row: dict[str, Any], name: str, required: bool) -> str | None:
    value = row.get(name)
    if value is None:
        return f"{name} is missing{_near(name, row)}" if required else None
    if not isinstance(value, str):
        return f"{name} must be text, not {type(value).__name__}"
    return _string_problem(value, name)


def _string_problem(text: str, name: str) -> str | None:
    if not text.strip():
        return f"{name} is empty"
    if "\x00" in text or any("\ud800" <= c <= "\udfff" for c in text):
        return f"{name} holds a NUL or half a surrogate pair, which no tokenizer takes"
    return None


def _near(name: str, row: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, [key for key in row if key not in FIELDS], n=1)
    return f"; did you mean {near[0]} to be {name}?" if near else ""


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    return tuple(Message(role=m["role"], content=m["content"]) for m in prompt)
