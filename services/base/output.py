"""Standard output of a command. A closed reader does not end a run, and ends other commands without a traceback."""

import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

CLOSED = 141  # exit code after the reader has closed, as a shell reports it for SIGPIPE


class Output:
    """Output stream of a long command. Text that cannot be written is dropped, and the command goes on.

    A closed reader does not come back, so the rest of the process writes to /dev/null. A full disk may have room again,
    so each write is tried.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._reported = False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            discard(self._stream)
        if not self._reported:
            self._reported = True
            with suppress(OSError):
                print(f"sdft: the output cannot be written ({error.strerror}); the work goes on", file=sys.stderr)


def lasting_output() -> TextIO:
    """Return standard output wrapped for a command that goes on without it."""
    return cast(TextIO, Output(sys.stdout))


def discard(stream: TextIO) -> None:
    """Send the stream's buffer, and all later writes, to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):  # a stream in memory has no descriptor
        os.dup2(null, stream.fileno())
    os.close(null)


def reader_gone() -> bool:
    """Return whether standard output or standard error is a pipe without a reader. Such a stream is discarded."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        with suppress(OSError):  # a stream in memory has no descriptor
            poll.register(stream, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            discard(stream)
            gone = True
    return gone
