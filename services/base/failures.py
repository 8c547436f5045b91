"""Failures: the reason in one line, the number within an hour, and the back-off."""

import re
import time
from collections import deque

from ray.exceptions import RayActorError

HOUR_S = 3600
LONGEST_BACK_OFF_S = 60
LONGEST_REASON = 240  # characters
CREATION_TASK = "creation task"  # in Ray's message for an actor whose __init__ raised
NUMBERS = re.compile(r"(class_name|actor_id|pid|name|namespace|ip): ")


class Losses:
    """Counts the losses of the last hour, and computes the back-off before the next start."""

    def __init__(self) -> None:
        self._when: deque[float] = deque()
        self._in_a_row = 0

    def count(self) -> int:
        """Count one loss, and return the number within the last hour."""
        self._in_a_row += 1
        self._when.append(time.monotonic())
        while self._when[-1] - self._when[0] > HOUR_S:
            self._when.popleft()
        return len(self._when)

    def recovered(self) -> None:
        """Reset the back-off after a success."""
        self._in_a_row = 0

    @property
    def back_off_s(self) -> float:
        """Back-off in seconds: 0 after the first loss in a row, then 1, 3, 7 and so on, at most LONGEST_BACK_OFF_S."""
        return min(2.0 ** min(self._in_a_row - 1, 10) - 1, LONGEST_BACK_OFF_S)


def reason(error: BaseException) -> str:
    """Return the reason of a failure in one line.

    Ray wraps an exception of an actor into a text with its whole traceback, and puts the reason of a death below a list
    of the actor's names and numbers.
    """
    cause = getattr(error, "cause", None) or error
    # The text of a KeyError is only the key.
    text = f"{type(cause).__name__}: {cause}" if isinstance(cause, LookupError) else str(cause)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, RayActorError) and lines and CREATION_TASK in lines[0]:
        return lines[-1]  # below the traceback
    if isinstance(error, RayActorError) and len(lines) > 1:
        death = " ".join(line for line in lines[1:] if not NUMBERS.match(line))
        return death if len(death) <= LONGEST_REASON else death[:LONGEST_REASON].rpartition(" ")[0] + " …"
    return lines[0] if lines else type(cause).__name__
