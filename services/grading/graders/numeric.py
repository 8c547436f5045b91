"""numeric: the last number in the reply equals the answer within a tolerance."""

import math
import re
from typing import Any

# Commas may separate thousands. "3." at the end of a sentence is 3. The hyphen of "2024-11" is not a minus sign.
_NUMBER = re.compile(
    # A number begins after the comma of "(3,4)", but not within "1,2345", where the comma separates thousands.
    r"(?<![\w.])(?!(?<=\d,)(?<!\d{4},)\d{3})[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|(?<![\w.])[-+−]?\.\d+"
)
EXACT = 1e-9  # relative tolerance: floating-point rounding only


def grade(text: str, answer: Any) -> bool:
    """Whether the last number of `text` is `answer`, or within its `tolerance` (absolute) of its `value`."""
    found = _NUMBER.findall(text)
    if not found:
        return False
    value, tolerance = _wanted(answer)
    return math.isclose(_number(found[-1]), value, rel_tol=EXACT, abs_tol=tolerance)


def check_answer(answer: Any) -> str | None:
    """None for a number, a string that is one, or {"value": number, "tolerance": number}; else the reason."""
    if isinstance(answer, dict):
        if set(answer) != {"value", "tolerance"} or not all(_is_number(x) for x in answer.values()):
            return 'answer must be a number or {"value": number, "tolerance": number}'
        return None if answer["tolerance"] >= 0 else "answer's tolerance must not be negative"
    if _is_number(_number(answer) if isinstance(answer, str) and _NUMBER.fullmatch(answer.strip()) else answer):
        return None
    return 'answer must be a number or {"value": number, "tolerance": number}'


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _wanted(answer: Any) -> tuple[float, float]:
    if isinstance(answer, dict):
        return float(answer["value"]), float(answer["tolerance"])
    return (_number(answer) if isinstance(answer, str) else float(answer)), 0.0


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))
