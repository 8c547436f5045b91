"""Graders: each maps a reply and a row's `answer` to right or wrong. One module per grader, listed in GRADERS."""

from typing import Any, Protocol

from sdft.services.grading.graders import choice, contains, exact, instruction, numeric, tool_call


class Grader(Protocol):
    """What a grader module provides."""

    def grade(self, text: str, answer: Any) -> bool:
        """Whether the reply `text` is right; `answer` must have passed check_answer."""

    def check_answer(self, answer: Any) -> str | None:
        """Return None if this grader can use a row's `answer`, else a short reason."""


GRADERS: dict[str, Grader] = {
    "exact": exact,
    "contains": contains,
    "choice": choice,
    "numeric": numeric,
    "tool_call": tool_call,
    "instruction": instruction,
}
