"""Standard output of a command: a long one goes on without it, a short one ends without a traceback."""

import os
import select
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

CLOSED = 141  # exit code after the reader has closed, as a shell reports it for SIGPIPE


class OutputFailed(OSError):
    """Standard output cannot be written, for another reason than a closed reader."""


class _Stream(ABC):
    """Wrapped output stream. `failed` receives the errors of its writes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self.failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @abstractmethod
    def failed(self, error: OSError) -> None: ...


class Output(_Stream):
    """Output stream of a long command. Text that cannot be written is dropped, and the command goes on.

    A closed reader does not come back, so the rest of the process writes to /dev/null. A full disk may have room again,
    so each write is tried.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._reported = False

    def failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            discard(self._stream)
        else:
            drop(self._stream)
        if not self._reported:
            self._reported = True
            with suppress(OSError):
                print(f"sdft: the output cannot be written ({error.strerror}); the work goes on", file=sys.stderr)


class _Raising(_Stream):
    """Output stream that raises OutputFailed for its own errors. Other OSErrors of the command stay what they are."""

    def failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError | OutputFailed):
            raise error
        raise OutputFailed(error.errno, error.strerror) from error


@contextmanager
def raising_output() -> Iterator[None]:
    """Make an error of standard output inside the context an OutputFailed, or as before a BrokenPipeError."""
    stream = sys.stdout
    if stream is None:  # a shell has closed it (>&-)
        with Path(os.devnull).open("w") as null, redirect_stdout(null):
            yield
        return
    try:
        with redirect_stdout(cast(TextIO, _Raising(stream))):
            try:
                yield
            finally:
                sys.stdout.flush()
    except OutputFailed:
        drop(stream)
        raise


def lasting_output() -> TextIO:
    """Return standard output wrapped for a command that goes on without it."""
    return cast(TextIO, Output(sys.stdout))


def discard(stream: TextIO) -> None:
    """Send the stream's buffer, and all later writes, to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):  # a stream in memory has no descriptor
        os.dup2(null, stream.fileno())
    os.close(null)


def drop(stream: TextIO) -> None:
    """Empty the stream's buffer into /dev/null: Python would try to write it again at its end."""
    with suppress(OSError):  # a stream in memory has no descriptor
        kept = os.dup(stream.fileno())
        discard(stream)
        with suppress(OSError):
            stream.flush()
        os.dup2(kept, stream.fileno())
        os.close(kept)


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
