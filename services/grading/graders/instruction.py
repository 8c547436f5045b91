"""instruction: the reply keeps every rule of the answer; each rule is checked by code.

answer: a list of rules such as {"rule": "lines", "n": 3} or {"rule": "contains", "text": "river"}; RULES lists them.
"""

import json
import re
from collections.abc import Callable
from typing import Any


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


# Rule name -> (name of its parameter, if it takes one; check(stripped reply, parameter)).
RULES: dict[str, tuple[str | None, Callable[[str, Any], bool]]] = {
    "contains": ("text", _has),  # as whole words, ignoring case
    "lacks": ("text", lambda reply, word: not _has(reply, word)),
    "starts_with": ("text", lambda reply, text: reply.startswith(text)),
    "ends_with": ("text", lambda reply, text: reply.endswith(text)),
    "words_at_most": ("n", lambda reply, n: 0 < len(_words(reply)) <= n),
    "words_at_least": ("n", lambda reply, n: len(_words(reply)) >= n),
    "lines": ("n", lambda reply, n: len(_lines(reply)) == n),  # non-empty lines
    "sentences": ("n", lambda reply, n: len(re.findall(r"[.!?]+(?=\s|$)", reply)) == n),
    "bullets": ("n", lambda reply, n: sum(line.lstrip().startswith(("- ", "* ")) for line in _lines(reply)) == n),
    "numbered": ("n", lambda reply, n: len(re.findall(r"^\s*\d+[.)] ", reply, re.MULTILINE)) == n),
    "uppercase": (None, lambda reply, _: reply.upper() == reply and reply.lower() != reply),
    "lowercase": (None, lambda reply, _: reply.lower() == reply and reply.upper() != reply),
    "json": (None, lambda reply, _: _is_json(reply)),  # one object and nothing else
}


def grade(text: str, answer: Any) -> bool:
    """Whether the reply keeps all rules; an empty one keeps none."""
    reply = text.strip()
    return bool(reply) and all(_keeps(reply, rule) for rule in answer)


def check_answer(answer: Any) -> str | None:
    """None for a non-empty list of rules; else the reason."""
    if not isinstance(answer, list) or not answer:
        return 'answer must be a list of rules such as {"rule": "lines", "n": 3}'
    for number, rule in enumerate(answer, start=1):
        name = rule.get("rule") if isinstance(rule, dict) else None
        if not isinstance(name, str) or name not in RULES:
            return f"rule {number} must be one of {', '.join(RULES)}"
        parameter = RULES[name][0]
        if set(rule) != {"rule"} | ({parameter} if parameter else set()):
            wanted = f"the parameter {parameter} and no other" if parameter else "no parameter"
            return f"rule {number}, {name}, must have {wanted}"
        expected = {"n": int, "text": str}.get(parameter or "")
        if expected is not None and type(rule[parameter]) is not expected:
            return f"rule {number}: {parameter} must be {'a whole number' if expected is int else 'text'}"
    return None


def _keeps(reply: str, rule: dict[str, Any]) -> bool:
    parameter, check = RULES[rule["rule"]]
    return check(reply, rule[parameter] if parameter else None)
