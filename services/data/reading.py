"""Read the columns of a row, in the format messages: the fields of its record, or all that is wrong with them."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdft.services.config.columns import COLUMNS
from sdft.services.data.messages import Message, message_of, messages_of
from sdft.services.data.tools import tools_of
from sdft.services.data.values import EMPTY, Unusable, check_characters, text_of

# Columns that change the prompt or hold part of the reply, and that no code here reads. Rows that have them are
# refused, because the run would train on a different question. Other columns (ids, sources) are ignored.
REFUSED = (
    *("system", "system_prompt", "input", "history", "documents", "chat_template_kwargs"),
    *("functions", "tool_calls", "function_call", "reasoning_content"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
# difflib ratio from which an unknown column counts as a typo of an optional one: contexts does, content does not.
NEAR_OPTIONAL = 0.86
# A column of another format -> that format, which is named if a row has the column and no prompt.
OTHER_FORMATS = {"conversations": "sharegpt", "instruction": "alpaca"}


@dataclass(frozen=True)
class Given:
    """A row as it is in the file, for messages."""

    columns: tuple[str, ...]
    called: dict[str, str]  # our name -> the column's name, for those that have another one
    has_formats: bool = True  # data.format can be set for it


def without_blanks(row: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    """Replace blank text in optional columns by null: some data sets use it for a missing value."""
    optional = {column: row.get(column) for column in COLUMNS if column not in required}
    return row | {column: None for column, v in optional.items() if isinstance(v, str) and not v.strip()}


def read_row(
    row: dict[str, Any],
    required: tuple[str, ...],
    check_answer: Callable[[Any], str | None],
    given: Given,
    teachers: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a record, and every problem of the row; each one begins with the column's name.

    required: columns that the row needs; "a|b" means one of both. teachers: what the column teacher may be; without
    them it is not read.
    """
    values: dict[str, Any] = {"messages": (), **dict.fromkeys(("demonstration", "context", "feedback", "answer"))}
    problems: list[str] = []
    asks = "prompt" in required
    for column in COLUMNS:
        used = {"text": column in required, "tools": asks, "teacher": bool(teachers)}
        if not used.get(column, True):
            continue  # common names of other columns, ignored in rows that do not need them
        value, name = row.get(column), given.called.get(column, column)
        try:
            if value is None:
                _check_absent(column, row, column in required, given)
            elif column == "teacher":
                values[column] = _teacher(value, name, teachers)
            elif column == "prompt":
                messages, reply = _prompt(value, name, row.get("demonstration") is not None)
                if asks:
                    values["messages"] = messages
                if reply is not None:
                    row = row | {"demonstration": reply}
            else:
                values[column] = _value(column, value, name, check_answer)
        except Unusable as problem:
            problems.append(
                f"{problem}; teacher.models has {_named(teachers)}" if column == "teacher" else str(problem)
            )
            if column == "prompt" and (isinstance(value, list) or _other_format(row)):
                # The demonstration may be the prompt's last message, or a column of the other format.
                required = tuple(c for c in required if c != "demonstration")
    for columns in (entry.split("|") for entry in required if "|" in entry):
        if all(row.get(column) is None for column in columns):
            names = " and ".join(given.called.get(column, column) for column in columns)
            problems.append(f"{names} are missing; give one of them")
    if asks:
        problems += [
            f"{name} is not used, although it may change the question; write it into the prompt, or remove it"
            for name in REFUSED
            if row.get(name) not in EMPTY
        ]
    return values, problems


def _check_absent(column: str, row: dict[str, Any], required: bool, given: Given) -> None:
    """Unusable if a column that a row does not have is needed, or is there under a name that looks like a typo."""
    name = given.called.get(column, column)
    near = _near_column(column, row, required) if name == column else None
    if near:
        raise Unusable(f"{column} is missing, but there is {near}; did you mean {column}?")
    if required:
        if name in given.columns:
            raise Unusable(f"{name} is null")
        other = _other_format(row) if column == "prompt" and given.has_formats else None
        mend = f"; set data.format: {OTHER_FORMATS[other]} to read {other}" if other else ""
        raise Unusable(f"{name} is missing (the row has {', '.join(given.columns) or 'no columns'}){mend}")


def _other_format(row: dict[str, Any]) -> str | None:
    """Return a column of the row that is the prompt in another format."""
    return next((column for column in OTHER_FORMATS if row.get(column) is not None), None)


def _near_column(column: str, row: dict[str, Any], required: bool) -> str | None:
    """Return a column of the row that is probably a typo of `column`."""
    # id is too short: idx and uid are columns of their own. answer is only read where replies are graded.
    if column in row or column in ("id", "tools") or (column == "answer" and not required):
        return None
    others = [str(name) for name in row if name not in COLUMNS]
    near = difflib.get_close_matches(column, others, n=1, cutoff=0.6 if required else NEAR_OPTIONAL)
    return near[0] if near else None


def _value(column: str, value: Any, name: str, check_answer: Callable[[Any], str | None]) -> Any:
    """Return the value of a column other than the prompt. Unusable says what is wrong with it."""
    if column == "answer":
        check_characters(value, name)
        reason = check_answer(value)
        if reason:
            raise Unusable(reason if reason.startswith("answer") else f"answer: {reason}")
        return value
    if column == "tools":
        return tools_of(value) or None
    if column == "demonstration":
        return _demonstration(value, name)
    if column == "id":
        return value if type(value) is int else _text(value, name, "text or a whole number")
    return _text(value, name, "text")


def _teacher(value: Any, name: str, teachers: Sequence[str]) -> str:
    if value not in teachers:
        raise Unusable(f"{name} is {json.dumps(value, ensure_ascii=False, default=str)}, which is not a teacher")
    return str(value)


def _named(teachers: Sequence[str]) -> str:
    return f"{', '.join(teachers[:-1])} and {teachers[-1]}"


def _text(value: Any, at: str, expected: str) -> str:
    """Return a text that must not be given in parts."""
    if isinstance(value, list):
        raise Unusable(f"{at} must be {expected}, not a list")
    return text_of(value, at, expected)


def _demonstration(value: Any, at: str) -> str | Message | tuple[Message, ...]:
    """Return a reply, or the messages of a conversation that goes on: replies, and what answered them."""
    if isinstance(value, list) and value and all(isinstance(v, dict) and "role" in v for v in value):
        messages = tuple(message_of(message, f"{at} message {i}") for i, message in enumerate(value, start=1))
        for place, message in (("first", messages[0]), ("last", messages[-1])):
            if message["role"] != "assistant":
                raise Unusable(f"{at}: the {place} message must be the assistant's, not the {message['role']}'s")
        for i, message in enumerate(messages, start=1):
            if message["role"] == "system":
                raise Unusable(f"{at} message {i}: a system message belongs into the prompt")
            if i > 1 and message["role"] == messages[i - 2]["role"] == "assistant":
                raise Unusable(f"{at} messages {i - 1} and {i} are both the assistant's; join them")
        return messages if len(messages) > 1 else _demonstration(value[0], at)
    if not isinstance(value, dict):
        return text_of(value, at)
    message = message_of(value, at)
    if message["role"] != "assistant":
        raise Unusable(f"{at}: role must be assistant, not {message['role']}")
    return message if "tool_calls" in message else message["content"]


def _prompt(value: Any, at: str, demonstrated: bool) -> tuple[tuple[Message, ...], Message | None]:
    """Return the messages of a prompt, and the last one apart if it is the assistant's: it is the demonstration.

    demonstrated: the row has a demonstration besides.
    """
    messages = messages_of(value, at)
    reply: Message | None = None
    if messages[-1]["role"] == "assistant":
        if demonstrated:
            raise Unusable(
                f"{at}: the last message must be the user's, not the assistant's, because the row also has a "
                f"demonstration; remove one of the two"
            )
        weight = value[-1].get("weight")
        if weight is not None and not weight:
            raise Unusable(
                f"{at} message {len(messages)}: weight is {weight}, but the last message is the demonstration, which "
                f"is trained; remove weight, or end with another reply"
            )
        *messages, reply = messages
    if all(message["role"] != "user" for message in messages):
        raise Unusable(f"{at}: no message is the user's; put one before the reply")
    if messages[-1]["role"] not in ("user", "tool"):
        before = " before the reply" if reply else ""
        raise Unusable(
            f"{at}: the last message{before} must be the user's or a tool's, not the {messages[-1]['role']}'s"
        )
    return tuple(messages), reply
