"""contains: an accepted string occurs in the reply, ignoring case, as whole words and whole numbers."""

import re
from typing import Any

from sdft.services.grading.graders import exact

# "5" does not match within "15", "x5", "5.2", "1.5", "5,000" or "-5"; it matches in "5." and "3-5".
_NOT_AFTER = r"(?<!\w)"
_NOT_WITHIN_NUMBER = r"(?<!\d[.,])(?<!(?<!\w)[-−])"
_NOT_BEFORE = r"(?!\w)"
_NOT_BEFORE_DECIMALS = r"(?![.,]\d)"


def grade(text: str, answer: Any) -> bool:
    """Whether any accepted string occurs in `text` between word boundaries; white space matches any white space."""
    return any(re.search(_pattern(accepted), text, re.IGNORECASE) for accepted in exact.accepted_strings(answer))


def check_answer(answer: Any) -> str | None:
    """None for a string or a list of strings, none of them blank; else the reason."""
    return exact.check_answer(answer)


def _pattern(accepted: str) -> str:
    """Build the pattern. A boundary is required only where the accepted string begins or ends with a word character."""
    words = accepted.split()
    first, last = words[0][0], words[-1][-1]
    before = after = ""
    if re.match(r"\w", first):
        before = _NOT_AFTER + (_NOT_WITHIN_NUMBER if first.isdigit() else "")
    if re.match(r"\w", last):
        after = _NOT_BEFORE + (_NOT_BEFORE_DECIMALS if last.isdigit() else "")
    return before + r"\s+".join(re.escape(word) for word in words) + after
