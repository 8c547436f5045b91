"""Rows in other formats (data.format), as rows with the columns of the format messages.

sharegpt    conversations: [{from, value}, …], system            ─► prompt
alpaca      instruction, input, output, system, history          ─► prompt, demonstration
"""

from typing import Any

from sdft.services.config.columns import OF_FORMAT, REPLACED, Format
from sdft.services.data.messages import HARMLESS
from sdft.services.data.rows import json_kind
from sdft.services.data.tools import calls_of
from sdft.services.data.values import EMPTY, Unusable, json_of, refuse_others, text_of

Row = dict[str, Any]
# Value of `from` -> role. A turn from function_call is an assistant's message with calls.
SENDERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def in_our_columns(format_: Format, row: Row) -> tuple[Row, dict[str, str]]:
    """Return the row with our columns, and the names in the row of those that have another one, for messages.

    The format messages also has rows with a column messages (OpenAI's name) in place of prompt. Unusable says what is
    wrong with a column of the format.
    """
    for column in REPLACED[format_]:
        if row.get(column) not in EMPTY:
            instead = {"prompt": OF_FORMAT[format_][0], "demonstration": "output"}[column]
            raise Unusable(
                f"{column} is not read in data.format: {format_}, which has {instead}; remove the column, or set "
                f"data.format: messages"
            )
    others = {name: value for name, value in row.items() if name not in (*OF_FORMAT[format_], *REPLACED[format_])}
    if format_ == "sharegpt":
        system, turns = _system(row), _turns(_there(row, "conversations"))
        if system and any(turn["role"] == "system" for turn in turns):
            raise Unusable("system is given, and conversations has a system turn too; remove one of them")
        return others | {"prompt": [*system, *turns]}, {"prompt": "conversations"}
    if format_ == "alpaca":
        prompt = [*_system(row), *_history(row.get("history")), _message("user", _instruction(row))]
        called = {"prompt": "instruction", "demonstration": "output"}
        return others | {"prompt": prompt, "demonstration": row.get("output")}, called  # None: no demonstration
    if row.get("prompt") is None and row.get("messages") is not None:
        del others["messages"]
        return others | {"prompt": row["messages"]}, {"prompt": "messages"}
    return row, {}


def _there(row: Row, column: str) -> Any:
    if row.get(column) is None:
        has = ", ".join(row) or "no columns"
        raise Unusable(f"{column} is null" if column in row else f"{column} is missing (the row has {has})")
    return row[column]


def _message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _system(row: Row) -> list[Row]:
    system = row.get("system")
    if system in EMPTY or (isinstance(system, str) and not system.strip()):
        return []
    return [_message("system", text_of(system, "system"))]


def _turns(turns: Any) -> list[Row]:
    if not isinstance(turns, list):
        raise Unusable(f"conversations must be a list of turns, not {json_kind(turns)}")
    if not turns:
        raise Unusable("conversations is an empty list")
    return [_turn(turn, f"conversations turn {number}") for number, turn in enumerate(turns, start=1)]


def _turn(turn: Any, at: str) -> Row:
    if not isinstance(turn, dict):
        raise Unusable(f"{at} must be an object with from and value, not {json_kind(turn)}")
    sender = turn.get("from")
    if not isinstance(sender, str) or sender not in SENDERS:
        raise Unusable(f"{at}: from must be one of {', '.join(SENDERS)}, not {sender!r}")
    refuse_others(
        turn, ("from", "value", *HARMLESS), at, "only from and value are; write it into the value, or remove it"
    )
    role, value = SENDERS[sender], turn.get("value")
    if sender == "function_call":
        calls = json_of(value, f"{at}: value") if isinstance(value, str) else value
        called = calls_of(calls if isinstance(calls, list) else [calls], f"{at}: value")
        if not called:
            raise Unusable(f"{at}: value has no call")
        return _message(role, "") | {"tool_calls": called}
    message = _message(role, text_of(value, f"{at}: value", may_be_blank=role == "tool"))
    return message | ({"weight": turn["weight"]} if "weight" in turn else {})


def _instruction(row: Row) -> str:
    instruction, more = text_of(_there(row, "instruction"), "instruction"), row.get("input")
    if more in EMPTY or (isinstance(more, str) and not more.strip()):
        return instruction
    return f"{instruction}\n\n{text_of(more, 'input')}"


def _history(history: Any) -> list[Row]:
    if history in EMPTY:
        return []
    if not isinstance(history, list):
        raise Unusable(f"history must be a list of pairs of an instruction and its reply, not {json_kind(history)}")
    messages = []
    for number, pair in enumerate(history, start=1):
        at = f"history entry {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable(f"{at} must be a list of two texts, an instruction and its reply")
        asked, reply = pair
        messages += [
            _message("user", text_of(asked, f"{at}: instruction")),
            _message("assistant", text_of(reply, f"{at}: reply")),
        ]
    return messages
