"""The journal of a service: its decisions in a file, each on the disk before it takes effect.

One process writes at a time: the lock of the file is that of the service.
"""

from pathlib import Path

from sdft.services.base.appended import AppendedFile
from sdft.services.base.errors import UserError
from sdft.services.releases.events import Event, event_of, line_of
from sdft.services.releases.state import ServiceState


class ServiceRunning(UserError):
    """Another process runs the service in this folder."""


class JournalDamaged(UserError):
    """A line of the file is no decision."""


def replay(path: Path, state: ServiceState) -> int:
    """Apply the decisions in a file to `state`; return the offset of the end of the last one.

    A last line without its end does not count. Raises JournalDamaged with the number of a bad line.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                state.apply(event_of(line))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                what = f"{type(error).__name__}: {error}"
                raise JournalDamaged(f"{path}:{number} is no decision of a service ({what}); restore it") from None
            end += len(line)
    return end


def read_state(path: Path) -> ServiceState:
    """Return the state that the decisions in a file add up to; the state of a new service if there is no file."""
    state = ServiceState()
    if path.exists():
        replay(path, state)
    return state


class Journal:
    """The decisions in a file, the state that they add up to, and the only writer of both."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises ServiceRunning or JournalDamaged."""
        self.path = path
        self.state = ServiceState()
        try:
            self._file = AppendedFile(path)
        except BlockingIOError:
            raise ServiceRunning(f"{path.parent}: another service runs in this folder; stop it first") from None
        try:
            self._file.cut(replay(path, self.state))
        except BaseException:
            self._file.close()
            raise

    def write(self, event: Event) -> None:
        """Write a decision, and apply it. Raises OSError if the disk does not take it; nothing has changed then."""
        self._file.append(line_of(event))
        self.state.apply(event)

    def close(self) -> None:
        """Let another process write."""
        self._file.close()
