"""Run a module of the learner in another process, because it needs torch, which this process does not import."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdft.services.base.errors import UserError


@contextmanager
def start(module: str, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """Run `python -m module arguments` inside the block. An error in the block kills it."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the same modules as this process
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def answer(process: "subprocess.Popen[str]") -> Any:
    """Wait for the process, and return the JSON in the last line that it printed.

    UserError if it was killed, RuntimeError if it failed.
    """
    out, log = process.communicate()
    if process.returncode < 0:
        raise UserError(
            f"a process that reads the model was killed by signal {-process.returncode}, as happens when memory is "
            f"short; free memory, and run the same command again"
        )
    if process.returncode != 0:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}: {log[-2000:]}")
    return json.loads(out.splitlines()[-1])
