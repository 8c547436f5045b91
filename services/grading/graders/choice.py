"""choice: the letter in the last `<answer>X</answer>` of the reply is the right one."""

import re
from typing import Any

# The negative lookahead starts the match at the nearest <answer>, so an unclosed tag before it has no effect.
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def grade(text: str, answer: Any) -> bool:
    """Whether the last answer tag holds the letter `answer` and nothing else but white space."""
    contents = _ANSWER.findall(text)
    return bool(contents) and contents[-1].strip() == answer


def check_answer(answer: Any) -> str | None:
    """None for a single letter A to Z; else the reason."""
    if isinstance(answer, str) and re.fullmatch("[A-Z]", answer):
        return None
    return "answer must be a single letter A to Z"
