"""waiting.json: the current waits of a live run."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WAITING = "waiting.json"


@dataclass(frozen=True)
class Waiting:
    """One wait, as in waiting.json."""

    what: str
    since: float  # seconds since the epoch


def read_waiting(run_dir: Path) -> list[Waiting]:
    """Return the waits of a live run, the longest first; [] if there is no waiting.json."""
    with suppress(FileNotFoundError):
        return [Waiting(**row) for row in json.loads((run_dir / WAITING).read_text())]
    return []
