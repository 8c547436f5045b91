"""tool_call: the calls in the reply are the expected ones (the rule of the SDFT paper, arXiv 2601.19897).

A call is a pair of lines, `Action: NAME` and `Action Input: JSON object`. A reply is right if the multiset of its
action names and its arguments (the objects of all calls, merged in order) both equal those of the answer.
"""

import json
import re
from collections import Counter
from typing import Any, NamedTuple

_ACTION = re.compile(r"^[ \t]*Action:[ \t]*(\S.*?)[ \t\r]*$", re.MULTILINE)
_ACTION_INPUT = re.compile(r"\s*Action Input:\s*")
_SHAPE = 'answer must be a list of {"Action": a name, "Action_Input": a JSON object or its text}'


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


def grade(text: str, answer: Any) -> bool:
    """Whether `text` makes the calls of `answer`; a reply with an action whose input is not a JSON object is wrong."""
    made = parse_calls(text)
    if made is None:
        return False
    expected = [Call(call["Action"].strip(), _arguments(call["Action_Input"]) or {}) for call in answer]
    return _names(made) == _names(expected) and _same(_merged(made), _merged(expected))


def check_answer(answer: Any) -> str | None:
    """None for a non-empty list of calls; else the reason."""
    if not isinstance(answer, list) or not answer:
        return _SHAPE
    for number, call in enumerate(answer, start=1):
        if not isinstance(call, dict) or set(call) != {"Action", "Action_Input"}:
            return _SHAPE
        if not isinstance(call["Action"], str) or not call["Action"].strip():
            return f"Action of call {number} must be a tool's name"
        if _arguments(call["Action_Input"]) is None:
            return f"Action_Input of call {number} must be a JSON object or its text"
    return None


def parse_calls(text: str) -> list[Call] | None:
    """Parse the calls of a reply in order; None if an `Action:` line has no JSON object as its input.

    The search continues after each object, so an "Action:" within an argument is not parsed as a call.
    """
    calls: list[Call] = []
    position = 0
    while action := _ACTION.search(text, position):
        action_input = _ACTION_INPUT.match(text, action.end())
        if action_input is None:
            return None
        decoded = _decode(text, action_input.end())
        if decoded is None:
            return None
        arguments, position = decoded
        calls.append(Call(action[1], arguments))
    return calls


def _decode(text: str, start: int) -> tuple[dict[str, Any], int] | None:
    """Return the JSON object at `start` and its end position, or None."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # not JSON, too long a number, or nested too deep
        return None
    return (value, end) if isinstance(value, dict) else None


def _arguments(action_input: Any) -> dict[str, Any] | None:
    """Return an answer's input as an object; None if it is neither an object nor exactly the text of one."""
    if isinstance(action_input, dict):
        return action_input
    if not isinstance(action_input, str):
        return None
    stripped = action_input.strip()
    decoded = _decode(stripped, 0)
    return decoded[0] if decoded is not None and decoded[1] == len(stripped) else None


def _names(calls: list[Call]) -> Counter[str]:
    return Counter(call.name for call in calls)


def _merged(calls: list[Call]) -> dict[str, Any]:
    return {name: value for call in calls for name, value in call.arguments.items()}


def _same(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal. 1 equals 1.0, but unlike in Python 1 does not equal true."""
    pending = [(first, second)]  # iterative: JSON may be nested deeper than the recursion limit
    while pending:
        a, b = pending.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                return False
            pending += [(a[name], b[name]) for name in a]
        elif isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                return False
            pending += zip(a, b, strict=True)
        elif isinstance(a, bool) != isinstance(b, bool) or a != b:
            return False
    return True
