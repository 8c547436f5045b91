"""Environments of a few lines."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdft.services.environments.base import Answer, Done, Environment


class Counting(Environment):
    """Is solved by so many replies. A reply may ask for trouble."""

    def __init__(self, turns: int = 2) -> None:
        self._turns, self._count = turns, 0

    async def reset(self, record: Mapping[str, Any]) -> None:
        if isinstance(record.get("answer"), list):
            self._closed = Path(record["answer"][0])
            raise RuntimeError("no such house")
        self._name = record["id"]

    async def close(self) -> None:
        if hasattr(self, "_closed"):
            self._closed.write_text("closed")

    async def step(self, reply: str) -> Answer | Done:
        self._count += 1
        for word, work in TROUBLE.items():
            if word in reply:
                return await work()
        if self._count == self._turns:
            return Done(passed="yes" in reply, feedback=f"{self._name} after {self._count}")
        return f"{self._name} heard {reply}"


async def _raise() -> Answer:
    raise KeyError("lamp")


async def _sleep() -> Answer:
    await asyncio.sleep(1000)
    return ""


async def _block() -> Answer:
    time.sleep(1000)
    return ""


async def _flood() -> Answer:
    return "x" * 100_000


async def _bytes() -> Answer:
    return b"\xff\x00"  # type: ignore[return-value]


async def _read() -> Answer:
    """Read the input, as code of a student may."""
    done = subprocess.run([sys.executable, "-c", "print(repr(input('')))"], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1]


async def _leave() -> Answer:
    """End the process, and leave one behind that has its error output."""
    subprocess.Popen(["sleep", "1000"])
    os._exit(4)


async def _work() -> Answer:
    time.sleep(0.6)
    return "worked"


async def _print() -> Answer:
    print('{"n": 1, "done": true}')
    return "printed"


async def _exit() -> Answer:
    os._exit(3)


async def _tool() -> Answer:
    return [{"role": "tool", "content": "21 degrees", "name": "thermometer"}]


TROUBLE = {
    "raise": _raise,
    "sleep": _sleep,
    "block": _block,
    "flood": _flood,
    "bytes": _bytes,
    "print": _print,
    "exit": _exit,
    "tool": _tool,
    "read": _read,
    "leave": _leave,
    "work": _work,
}
