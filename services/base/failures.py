"""Failures: the number within an hour, and the back-off."""

import time
from collections import deque

HOUR_S = 3600
LONGEST_BACK_OFF_S = 60


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
