"""exact: the whole reply, without the white space around it, is one of the accepted strings."""

from typing import Any


def grade(text: str, answer: Any) -> bool:
    """Whether the stripped `text` equals an accepted string, letter case included."""
    return text.strip() in (accepted.strip() for accepted in accepted_strings(answer))


def check_answer(answer: Any) -> str | None:
    """None for a string or a list of strings, none of them blank; else the reason."""
    if not isinstance(answer, (str, list)):
        return "answer must be a string or a list of strings"
    strings = accepted_strings(answer)
    if not strings:
        return "answer must list at least one string"
    if not all(isinstance(string, str) for string in strings):
        return "answer must be a string or a list of strings"
    if not all(string.strip() for string in strings):
        return "answer must not hold a blank string"
    return None


def accepted_strings(answer: str | list[str]) -> list[str]:
    """Return the accepted strings as a list; an answer is one string or a list of strings."""
    return [answer] if isinstance(answer, str) else answer
