"""Run a command's work until its end, or until SIGTERM or SIGINT. Every clean-up runs in both cases."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

STOPPED = 130  # exit code
STOP_S = 30.0  # limit of the clean-up


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as SIGINT does, until another handler is installed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_until_stopped(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` in its own event loop and return its result. Raises KeyboardInterrupt if a signal stopped it.

    Raises RuntimeError if `work` was cancelled without a signal, because a failed run would otherwise look like a
    stopped one.
    """
    try:
        return asyncio.run(_cancelled_by_signal_only(work))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def stop_on_signals() -> None:
    """Cancel the running task on SIGTERM and SIGINT. Must be called after ray.init, which replaces earlier handlers.

    If every process of a job gets the signal, Ray's control service may end first, and a call to it never returns. The
    process therefore exits if the clean-up takes longer than STOP_S.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def stop() -> None:
        task.cancel()
        limit = threading.Timer(STOP_S, _break_off)
        limit.daemon = True
        limit.start()
        task.add_done_callback(lambda _: limit.cancel())

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _break_off() -> None:
    print(f"sdft: stopped; Ray's processes did not answer within {STOP_S:g} s", file=sys.stderr, flush=True)
    os._exit(STOPPED)


async def _cancelled_by_signal_only(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    try:
        return await work
    except asyncio.CancelledError as error:
        if task.cancelling():
            raise
        raise RuntimeError("the work was cancelled without a stop signal; please report this bug") from error
