"""A signal stops a command. A cancellation inside the command does not count as a signal."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from sdft.services.base.signals import run_until_stopped, sigterm_interrupts, stop_on_signals


def test_a_cancellation_inside_the_work_is_a_failure() -> None:
    async def work() -> None:
        inner = asyncio.ensure_future(asyncio.sleep(60))
        inner.cancel()
        await inner

    with pytest.raises(RuntimeError, match="the work was cancelled without a stop signal"):
        run_until_stopped(work())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_work_after_its_clean_up(number: signal.Signals) -> None:
    cleaned = []

    async def work() -> None:
        stop_on_signals()
        os.kill(os.getpid(), number)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(number)

    with pytest.raises(KeyboardInterrupt):
        run_until_stopped(work())
    assert cleaned == [number]


# As a call to Ray whose control service got the signal too. Python runs no signal handler during a call in C.
IN_CLEAN_UP = """
    os.kill(os.getpid(), number)
    try: await asyncio.sleep(60)
    finally: time.sleep(60)
"""
IN_C = """
    threading.Timer(0.2, os.kill, [os.getpid(), number]).start()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("hangs", [IN_CLEAN_UP, IN_C])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_never_ends_is_broken_off(number: signal.Signals, hangs: str) -> None:
    code = (
        "import asyncio, ctypes, os, threading, time; import sdft.services.base.signals as s\n"
        f"number = {number:d}\n"
        f"async def work():\n    s.stop_on_signals(){hangs}\n"
        "s.STOP_S = 0.5\n"
        "s.run_until_stopped(work(), lambda: print('written down', flush=True))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stdout) == (130, "written down\n"), result.stderr
    assert result.stderr == "sdft: stopped; Ray's processes did not answer within 0.5 s\n"


def test_the_result_comes_back() -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return "done"

    assert run_until_stopped(work()) == "done"


def test_sigterm_stops_a_command_that_has_not_begun_its_work() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
