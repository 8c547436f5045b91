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


def test_a_clean_up_that_never_ends_is_broken_off() -> None:
    """As a call to Ray does after its control service got the signal too."""
    code = (
        "import asyncio, os, signal, time; import sdft.services.base.signals as s\n"
        "async def work():\n"
        "    s.stop_on_signals()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    try: await asyncio.sleep(60)\n"
        "    finally: time.sleep(60)\n"
        "s.STOP_S = 0.5\n"
        "s.run_until_stopped(work())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 130
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
