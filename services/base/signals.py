"""Run a command's work until its end, or until SIGTERM or SIGINT. Every clean-up runs in both cases."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

STOPPED = 130  # exit code
STOP_S = 25.0  # limit of the clean-up. Kubernetes and Slurm kill a process 30 s after the signal
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as SIGINT does, until another handler is installed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_until_stopped(work: Coroutine[Any, Any, T], broken_off: Callable[[], None] = lambda: None) -> T:
    """Run `work` in its own event loop and return its result. Raises KeyboardInterrupt if a signal stopped it.

    Raises RuntimeError if `work` was cancelled without a signal, because a failed run would otherwise look like a
    stopped one.
    The process exits if `work` has not ended STOP_S after a signal; broken_off() is called before, in another thread.
    """
    with _limited(broken_off):
        try:
            return asyncio.run(_cancelled_by_signal_only(work))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


def stop_on_signals() -> None:
    """Cancel the running task on SIGTERM and SIGINT. Must be called after ray.init, which replaces earlier handlers."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def stop(*_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)

    for number in SIGNALS:  # loop.add_signal_handler would take the file descriptor that _limited watches
        signal.signal(number, stop)


@contextmanager
def _limited(broken_off: Callable[[], None]) -> Iterator[None]:
    """Limit the time from a signal to the end of the block. Restores the signal handlers afterwards.

    If every process of a job gets the signal, Ray's control service may end first. A call to it then never returns, and
    Python runs no signal handler while its main thread is in such a call. So a thread reads the signals' numbers, which
    Python's C code writes into a pipe.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    ended = threading.Event()

    def watch() -> None:
        while (number := os.read(reader, 1)) and number[0] not in SIGNALS:
            pass
        if number and not ended.wait(STOP_S):
            try:
                broken_off()
            finally:
                print(f"sdft: stopped; Ray's processes did not answer within {STOP_S:g} s", file=sys.stderr, flush=True)
                os._exit(STOPPED)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the thread's read
        watching.join()
        os.close(reader)
        for number, handler in handlers.items():
            signal.signal(number, handler)


async def _cancelled_by_signal_only(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    try:
        return await work
    except asyncio.CancelledError as error:
        if task.cancelling():
            raise
        raise RuntimeError("the work was cancelled without a stop signal; please report this bug") from error
