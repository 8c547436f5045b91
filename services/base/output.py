"""Standard output of a command. A reader that has gone ends neither a run nor, with a traceback, any other command."""

import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

CLOSED = 141  # exit code of a command whose reader has gone: what a shell reports of a program ended by SIGPIPE


class Output:
    """The stream that a long command is shown on. What it does not take is dropped, and the command goes on.

    A reader that has gone does not come back: the rest of the process then writes to /dev/null. A full disk may have
    room again, so writing is tried again each time.
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
    """Standard output for a command that is to go on without it."""
    return cast(TextIO, Output(sys.stdout))


def discard(stream: TextIO) -> None:
    """Let what is still in the stream's buffer, and what follows, go to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):  # a stream in memory has no descriptor
        os.dup2(null, stream.fileno())
    os.close(null)


def reader_gone() -> bool:
    """Whether standard output or standard error is a pipe without a reader; what follows is discarded then."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        with suppress(OSError):  # a stream in memory has no descriptor
            poll.register(stream, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            discard(stream)
            gone = True
    return gone
