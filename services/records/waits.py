"""waiting.json: what a live run waits for."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WAITING = "waiting.json"


@dataclass(frozen=True)
class Waiting:
    """One wait, as a run directory holds it."""

    what: str
    since: float  # seconds since the epoch


def read_waiting(run_dir: Path) -> list[Waiting]:
    """What a live run waits for, the longest first; [] if it has not said so."""
    with suppress(FileNotFoundError):
        return [Waiting(**row) for row in json.loads((run_dir / WAITING).read_text())]
    return []
