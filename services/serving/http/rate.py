"""How many requests a holder of a token may send in a minute."""

import time
from collections import deque

from sdft.services.serving.http.errors import ApiError

MINUTE_S = 60.0


class Rate:
    """Counts requests by the name of their token."""

    def __init__(self, per_minute: int | None) -> None:
        """per_minute: None: no limit."""
        self._most = per_minute
        self._times: dict[str, deque[float]] = {}

    def count(self, name: str) -> None:
        """Count one request. Raises ApiError 429 if it is one too many."""
        if self._most is None:
            return
        times, now = self._times.setdefault(name, deque()), time.monotonic()
        while times and now - times[0] >= MINUTE_S:
            times.popleft()
        if len(times) >= self._most:
            wait_s = int(MINUTE_S - (now - times[0])) + 1
            text = f"{self._most} requests in a minute (service.http.max_per_minute); send it again in {wait_s} s"
            raise ApiError(429, "too_fast", text, retry_after_s=wait_s)
        times.append(now)
