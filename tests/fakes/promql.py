"""Parses a PromQL expression into metrics, label matchers and grouping labels. Covers the grammar that deploy/ uses."""

import re
from dataclasses import dataclass

TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\d+(?:\.\d+)?(?:ms|[smhdwy])?|[A-Za-z_:][\w:]*|[=!<>]=|[=!]~|\S')
GROUPING = ("by", "without", "on", "ignoring", "group_left", "group_right")
OPERATORS = ("and", "or", "unless", "bool", "offset")
FUNCTIONS = ("avg_over_time", "delta", "max", "max_over_time", "rate", "sum", "time", "vector")


@dataclass(frozen=True)
class Query:
    """The parts of an expression, in the order of the text."""

    metrics: tuple[str, ...]
    matchers: tuple[tuple[str, str, str], ...]  # metric, label, value
    grouped: tuple[str, ...]  # labels of by, on and the like


def parse(expression: str) -> Query:
    """Parse an expression. ValueError for a function that is not in FUNCTIONS, or for unbalanced brackets."""
    tokens = TOKEN.findall(expression)
    if any(tokens.count(left) != tokens.count(right) for left, right in ("()", "{}", "[]")):
        raise ValueError(f"{expression}: a parenthesis is missing")
    metrics: list[str] = []
    matchers: list[tuple[str, str, str]] = []
    grouped: list[str] = []
    i = 0
    while i < len(tokens):
        token, following = tokens[i], tokens[i + 1] if i + 1 < len(tokens) else ""
        if token in GROUPING:
            end = tokens.index(")", i)
            grouped += [t for t in tokens[i + 2 : end] if t != ","]
        elif token == "{":
            end = tokens.index("}", i)
            parts = [t for t in tokens[i + 1 : end] if t != ","]
            matchers += [(metrics[-1], parts[n], parts[n + 2].strip('"')) for n in range(0, len(parts), 3)]
        elif token == "[":
            end = tokens.index("]", i)
        else:
            end = i
            if re.match(r"[A-Za-z_:]", token) and token not in OPERATORS:
                if following != "(" and following not in GROUPING:
                    metrics.append(token)
                elif token not in FUNCTIONS:
                    raise ValueError(f"{expression}: {token} is no function that is used here")
        i = end + 1
    return Query(tuple(metrics), tuple(matchers), tuple(grouped))
