"""The decisions of a service, one JSON object a line, in the order in which they were made.

    {"kind": "opened", "window": 1, "parent": 1, "train": [0, 1, 3], "held_out": [2], "replayed": [], "at": ...}
    {"kind": "candidate", "release": 2, "window": 1, "folder": "releases/0002", "files": {...}, "at": ...}
    {"kind": "judged", "release": 2, "verdict": "promote", "reason": "...", "sets": [...], "at": ...}
    {"kind": "served", "release": 2, "by": "gate", "at": ...}

Records are named by their ids in the inbox. A release is a model folder that is whole: its files have these digests.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Opened:
    """A window has begun: a training run from the weights of `parent`."""

    window: int
    parent: int  # release
    train: list[int]
    held_out: list[int]
    replayed: list[int]  # records of earlier windows that are trained again
    at: float


@dataclass(frozen=True)
class Ended:
    """A window has ended without a candidate."""

    window: int
    back: bool  # its records wait again; false: they are quarantined
    reason: str
    at: float


@dataclass(frozen=True)
class Candidate:
    """A window has ended with a release that may be served."""

    release: int
    window: int | None  # None: the release that the service began with
    folder: str  # relative to the service's folder, or absolute
    files: dict[str, str]  # digest by name
    step: int  # optimizer steps of the window
    dropped: dict[str, str]  # record id -> reason: records of the window that were not trained
    at: float


@dataclass(frozen=True)
class Judged:
    """The gate has compared a candidate with the release that is served."""

    release: int
    verdict: str  # promote, hold or refuse
    reason: str
    sets: list[dict[str, Any]]
    at: float


@dataclass(frozen=True)
class Served:
    """All engines serve a release. What was trained from another one, and is not decided, ends with it."""

    release: int
    by: str  # start, gate or operator
    at: float


@dataclass(frozen=True)
class Refused:
    """A candidate will not be served. The records of its window are quarantined, or wait again in parts.

    parts: each is trained in a window of its own, to find the bad records.
    """

    release: int
    by: str  # gate or operator
    reason: str
    parts: list[list[int]]
    at: float


@dataclass(frozen=True)
class Held:
    """A candidate waits for a person. No window begins until it is promoted or refused."""

    release: int
    by: str
    reason: str
    at: float


@dataclass(frozen=True)
class Canary:
    """A candidate answers a share of the users. No window begins until that is decided."""

    release: int
    at: float


@dataclass(frozen=True)
class Pinned:
    """The weights of a release are kept, or not any more."""

    release: int
    pinned: bool
    at: float


@dataclass(frozen=True)
class Released:
    """Quarantined records wait again."""

    records: list[int]
    at: float


Event = Opened | Ended | Candidate | Judged | Served | Refused | Held | Canary | Pinned | Released
KINDS: dict[str, type[Event]] = {cls.__name__.lower(): cls for cls in Event.__args__}


def line_of(event: Event) -> bytes:
    fields = {"kind": type(event).__name__.lower()} | asdict(event)
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def event_of(line: bytes) -> Event:
    """Return the event of a line. Raises ValueError, KeyError, TypeError or AttributeError if it is none."""
    fields = json.loads(line)
    return KINDS[fields.pop("kind")](**fields)
