"""Tools of a row, and an assistant's calls of them, as they are read."""

from typing import Any

from sdft.services.data.rows import json_kind
from sdft.services.data.values import EMPTY, Unusable, check_characters, json_of, refuse_others, text_of

_SHAPE = '{"type": "function", "function": {"name": …}}'


def tools_of(value: Any) -> list[dict[str, Any]]:
    """Return the tool definitions of the column tools: a list of objects, or the JSON text of one."""
    tools = json_of(value, "tools") if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise Unusable(f"tools must be a list of tool definitions, not {json_kind(tools)}")
    for number, tool in enumerate(tools, start=1):
        if _name(function_of(tool)) is None:
            raise Unusable(f"tools entry {number} must be an object with a name, such as {_SHAPE}")
    check_characters(tools, "tools")
    return tools


def function_of(given: Any) -> Any:
    """Return the function of a definition or of a call: they are given as {"function": {…}}, or as the function."""
    return given.get("function", given) if isinstance(given, dict) else None


def _name(function: Any) -> str | None:
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name.strip() else None


def calls_of(value: Any, at: str) -> list[dict[str, Any]]:
    """Return an assistant's tool calls. The arguments of a call become an object, as chat templates expect."""
    if not isinstance(value, list):
        raise Unusable(f"{at} must be a list of calls, not {json_kind(value)}")
    return [_call(call, f"{at} entry {number}") for number, call in enumerate(value, start=1)]


def _call(call: Any, at: str) -> dict[str, Any]:
    function = function_of(call)
    name = _name(function)
    if name is None:
        raise Unusable(f"{at} must be an object with the name of a function, such as {_SHAPE}")
    if call.get("type") not in (*EMPTY, "function"):
        raise Unusable(f"{at} is of type {call['type']}, and only calls of functions are known; remove the call")
    outside, inside = ("id", "type", "index"), ("name", "arguments")
    if function is call:
        refuse_others(call, (*outside, *inside), at, "only id, name and arguments are; remove it")
    else:
        refuse_others(call, ("function", *outside), at, "only id, type and function are; remove it")
        refuse_others(function, inside, f"{at}: function", "only name and arguments are; remove it")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = json_of(arguments, f"{at}: arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise Unusable(f"{at}: arguments must be an object, or the JSON text of one, not {json_kind(arguments)}")
    check_characters([name, arguments], at)
    identity = {} if call.get("id") in EMPTY else {"id": text_of(call["id"], f"{at}: id")}
    return identity | {"type": "function", "function": {"name": name, "arguments": arguments}}
