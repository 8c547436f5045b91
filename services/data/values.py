"""Values of a row as they are read: texts, text parts, JSON in a text; what is empty, and what is refused."""

import json
from collections.abc import Iterable
from typing import Any

from sdft.services.data.rows import json_kind, parse_json

EMPTY: tuple[Any, ...] = (None, False, "", [], {})  # values of an empty column or member


class Unusable(ValueError):
    """What is wrong with a value of a row. The text begins with the value's place in the row."""


def text_of(value: Any, at: str, expected: str = "text", may_be_blank: bool = False) -> str:
    """Return a text that is given as text, or as a list of text parts, which are joined. Unusable if it is neither."""
    if isinstance(value, list):
        value = "".join(_part(part, f"{at} part {number}") for number, part in enumerate(value, start=1))
    if not isinstance(value, str):
        raise Unusable(f"{at} is null" if value is None else f"{at} must be {expected}, not {json_kind(value)}")
    if not (value.strip() or may_be_blank):
        raise Unusable(f"{at} is empty")
    check_characters(value, at)
    return value


def _part(part: Any, at: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        kind = "an object without type" if isinstance(part, dict) else json_kind(part)
        raise Unusable(f'{at} must be an object such as {{"type": "text", "text": …}}, not {kind}')
    if part["type"] != "text":
        raise Unusable(
            f"{at} is of type {part['type']}, and data is text only today; remove the part, or write what it says as "
            f"text"
        )
    refuse_others(part, ("type", "text"), at, "only type and text are; remove it")
    return text_of(part.get("text"), f"{at}: text", may_be_blank=True)


def refuse_others(value: dict[str, Any], known: Iterable[str], at: str, mend: str) -> None:
    """Unusable if an object has a member that is neither `known` nor empty."""
    other = next((name for name, inner in value.items() if name not in known and inner not in EMPTY), None)
    if other is not None:
        raise Unusable(f"{at}: {other} is not used, {mend}")


def json_of(text: str, at: str) -> Any:
    """Return the value of a JSON text. Unusable if it is not one."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as e:
        raise Unusable(f"{at}: not valid JSON: {e.msg} at character {e.pos + 1}") from None
    except (ValueError, RecursionError) as e:
        raise Unusable(f"{at}: not valid JSON: {e}") from None


def check_characters(value: Any, at: str) -> None:
    """Unusable if a text, or any text in a list or object, has a character that it must not have."""
    pending = [value]  # iterative: JSON may be nested deeper than the recursion limit
    while pending:
        inner = pending.pop()
        if isinstance(inner, dict):
            pending += [*inner, *inner.values()]
        elif isinstance(inner, list):
            pending += inner
        elif isinstance(inner, str) and "\0" in inner:
            raise Unusable(f"{at} holds a NUL character; remove it")
        elif isinstance(inner, str) and any("\ud800" <= c <= "\udfff" for c in inner):
            raise Unusable(f"{at} holds half a surrogate pair, which is not a character; remove it")
