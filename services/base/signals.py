"""A command's work until its end, or until SIGTERM or SIGINT; every clean-up runs in both cases."""

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
STOP_S = 30.0  # for the clean-up


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does, until somebody has another handler for it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_until_stopped(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, in an event loop of its own. KeyboardInterrupt if it was stopped by a signal.

    RuntimeError if something in it was cancelled though nobody stopped it: otherwise a run that failed would look like
    one that was stopped.
    """
    try:
        return asyncio.run(_told_apart(work))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def stop_on_signals() -> None:
    """From here on SIGTERM and SIGINT cancel the running task. Called after ray.init, which puts its own handler in the
    place of any before it.

    Where every process of a job gets the signal, Ray's control service may end first, and a call to it never returns:
    a clean-up that takes longer than STOP_S is broken off with the process.
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


async def _told_apart(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    try:
        return await work
    except asyncio.CancelledError as error:
        if task.cancelling():
            raise
        raise RuntimeError("something was cancelled though nobody stopped it; please report this mistake") from error
