"""A file that only grows, by one process at a time, and whose end is on the disk before a call returns."""

import fcntl
import os
from pathlib import Path


class AppendedFile:
    """A file with its lock. `size`: bytes that count; what is behind them is cut off."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises BlockingIOError if another process has opened it."""
        self.size = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(self._fd)
            raise

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes."""
        os.ftruncate(self._fd, size)
        self.size = size

    def append(self, data: bytes) -> None:
        """Add bytes, and wait until they are on the disk. Raises OSError; the file is as before then."""
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        """Let another process open it."""
        os.close(self._fd)
