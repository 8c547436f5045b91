"""Failures: the reason in one line, and how many there were within an hour."""

import re
import time
from collections import deque

from ray.exceptions import RayActorError

HOUR_S = 3600
LONGEST_BACK_OFF_S = 60
LONGEST_REASON = 240  # characters
IN_ITS_START = "creation task"  # Ray, of an actor whose __init__ raised
NUMBERS = re.compile(r"(class_name|actor_id|pid|name|namespace|ip): ")


class Losses:
    """How often something was lost in the last hour, and how long to wait before it is started once more."""

    def __init__(self) -> None:
        self._when: deque[float] = deque()
        self._in_a_row = 0

    def count(self) -> int:
        """One more: how many there were within an hour."""
        self._in_a_row += 1
        self._when.append(time.monotonic())
        while self._when[-1] - self._when[0] > HOUR_S:
            self._when.popleft()
        return len(self._when)

    def recovered(self) -> None:
        """It has worked since."""
        self._in_a_row = 0

    @property
    def back_off_s(self) -> float:
        """None after the first in a row, then 1 s, 3 s, 7 s and so on."""
        return min(2.0 ** min(self._in_a_row - 1, 10) - 1, LONGEST_BACK_OFF_S)


def reason(error: BaseException) -> str:
    """What went wrong, in one line. Ray wraps what an actor raises into a text with its whole traceback, and tells of a
    death below a list of the actor's names and numbers."""
    cause = getattr(error, "cause", None) or error
    text = f"{type(cause).__name__}: {cause}" if isinstance(cause, LookupError) else str(cause)  # a key is no sentence
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, RayActorError) and lines and IN_ITS_START in lines[0]:
        return lines[-1]  # below the traceback
    if isinstance(error, RayActorError) and len(lines) > 1:
        told = " ".join(line for line in lines[1:] if not NUMBERS.match(line))
        return told if len(told) <= LONGEST_REASON else told[:LONGEST_REASON].rpartition(" ")[0] + " …"
    return lines[0] if lines else type(cause).__name__
