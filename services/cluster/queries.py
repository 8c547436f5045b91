"""Advisory queries to the cluster: a failure is reported once per outage, and the run goes on."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from ray.exceptions import RayError

from sdft.actors.shared.reason import reason

T = TypeVar("T")

ANSWER_S = 10.0  # limit for one query
# A query to Ray's control service (GCS) raises RpcError, GetTimeoutError and RaySystemError, which are RayErrors, and
# OSError for I/O errors of its C++ code. TimeoutError is an OSError.
FAILURES = (RayError, OSError)


def in_thread(ask: Callable[[], T]) -> "Future[T]":
    """Run `ask` in a daemon thread, which blocks neither the event loop nor the end of the process.

    Ray's own calls have no time limit: they wait while the control service is away.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - raised where the answer is awaited
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


class Query(Generic[T]):
    """A repeated query. One that is not answered in time stays open, and the next `answer` waits for the same one:
    there is never a second thread."""

    def __init__(self, ask: Callable[[], T], limit_s: float = ANSWER_S) -> None:
        self._ask, self._limit_s = ask, limit_s
        self._open: Future[T] | None = None

    async def answer(self) -> T:
        """Return the result of `ask`, or raise its error; TimeoutError after `limit_s`."""
        asked = self._open = self._open or in_thread(self._ask)
        deadline = time.monotonic() + self._limit_s
        while not asked.done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer for {self._limit_s:g} s")
            await asyncio.sleep(0.02)
        self._open = None
        return asked.result()


class Outage:
    """Reports the start and the end of an outage of an advisory query."""

    def __init__(self, query: str, notice: Callable[[str], None]) -> None:
        """query: its name, the subject of the notices, such as "the query for draining nodes"."""
        self._query, self._notice = query, notice
        self._since: float | None = None

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Catch FAILURES of the block, and report when an outage begins or ends."""
        try:
            yield
        except FAILURES as error:
            if self._since is None:
                self._since = time.monotonic()
                self._notice(f"{self._query} fails ({reason(error)}); the run continues and retries the query")
        else:
            if self._since is not None:
                took, self._since = time.monotonic() - self._since, None
                self._notice(f"{self._query} works again after {took:.0f} s")
