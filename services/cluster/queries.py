"""Questions to the cluster that only advise a run: a failure is reported once an outage, and the run goes on."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from ray.exceptions import RayError

from sdft.services.base.failures import reason

T = TypeVar("T")

ANSWER_S = 10.0  # for one question
# What a question to Ray's control service (GCS) raises: RpcError, GetTimeoutError and RaySystemError, which are
# RayErrors, and OSError for what its C++ code calls an I/O error.
FAILURES = (RayError, OSError)


def in_thread(ask: Callable[[], T]) -> "Future[T]":
    """Ask in a thread that keeps neither the event loop nor the end of the process waiting.

    Ray's own calls have no time limit: while the control service is away they wait for it.
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
    """A question that is asked again and again. One that is not answered in time stays open, and the next `answer`
    waits for the same one: there is never a second thread."""

    def __init__(self, ask: Callable[[], T], limit_s: float = ANSWER_S) -> None:
        self._ask, self._limit_s = ask, limit_s
        self._open: Future[T] | None = None

    async def answer(self) -> T:
        """The answer, or what the question raises; TimeoutError after `limit_s`."""
        asked = self._open = self._open or in_thread(self._ask)
        deadline = time.monotonic() + self._limit_s
        while not asked.done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer for {self._limit_s:g} s")
            await asyncio.sleep(0.02)
        self._open = None
        return asked.result()


class Outage:
    """Whether something that only advises fails at present: reported when that begins, and when it ends."""

    def __init__(self, what: str, notice: Callable[[str], None]) -> None:
        """what: the subject of the sentence, such as "the query for draining nodes"."""
        self._what, self._notice = what, notice
        self._since: float | None = None

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """What is done within may fail by one of FAILURES."""
        try:
            yield
        except FAILURES as error:
            if self._since is None:
                self._since = time.monotonic()
                self._notice(f"{self._what} fails ({reason(error)}); the run goes on, and it is tried again")
        else:
            if self._since is not None:
                took, self._since = time.monotonic() - self._since, None
                self._notice(f"{self._what} works again after {took:.0f} s")
