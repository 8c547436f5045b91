"""The state of a service: what its decisions add up to.

record    waiting ─► in a window ─┬─► trained ──► in a release
             ▲                    ├─► held out     (asked by the gate, never trained)
             │                    └─► dropped      (the run could not train it)
             └── the window ended without a release, or the record was let out of quarantine

release   candidate ─┬─► served ─► earlier ─► withdrawn (rolled back)
                     ├─► held ─► served or refused
                     └─► refused                       refused, withdrawn: its window's records are quarantined
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from sdft.services.releases.events import (
    Candidate,
    Ended,
    Event,
    Held,
    Judged,
    Opened,
    Pinned,
    Refused,
    Released,
    Served,
    Split,
)

ReleaseStatus = Literal["candidate", "held", "served", "earlier", "refused", "withdrawn"]
GONE = ("refused", "withdrawn")
STATES = ("waiting", "in window", "trained", "held out", "dropped", "quarantined", "deleted")  # of a record


@dataclass
class Window:
    """One training run on records that came over HTTP."""

    number: int
    parent: int
    train: list[int]
    held_out: list[int]
    replayed: list[int]
    opened: float
    release: int | None = None  # None: it has no candidate, or none yet
    ended: str | None = None  # why it ended without a candidate
    back: bool = False
    dropped: dict[int, str] = field(default_factory=dict)
    out: set[int] = field(default_factory=set)  # records that were let out of quarantine

    @property
    def open(self) -> bool:
        return self.release is None and self.ended is None


@dataclass
class Release:
    """A model folder that is, was or may be served."""

    number: int
    window: int | None
    parent: int | None
    folder: str
    files: dict[str, str]
    step: int
    made: float
    status: ReleaseStatus = "candidate"
    reason: str = ""
    verdict: str = ""
    sets: list[dict[str, Any]] = field(default_factory=list)
    served_at: float | None = None
    pinned: bool = False


@dataclass(frozen=True)
class RecordState:
    """Where a record is. reason: of a dropped or quarantined one."""

    state: Literal["waiting", "in window", "trained", "held out", "dropped", "quarantined", "deleted"]
    window: int | None = None
    release: int | None = None
    reason: str = ""


class ServiceState:
    """Windows, releases and records, from the decisions so far."""

    def __init__(self) -> None:
        self.windows: dict[int, Window] = {}
        self.releases: dict[int, Release] = {}
        self.served: int | None = None
        self.decisions = 0
        self.parts: list[list[int]] = []  # records of refused windows that wait for windows of their own
        self._window_of: dict[int, Window] = {}  # the newest window of each record

    def apply(self, event: Event) -> None:
        """Take one more decision."""
        self.decisions += 1
        match event:
            case Opened():
                window = Window(event.window, event.parent, event.train, event.held_out, event.replayed, event.at)
                self.windows[event.window] = window
                new = {*event.train, *event.held_out}
                self.parts = [part for part in self.parts if not new.intersection(part)]
                self._window_of |= dict.fromkeys([*event.train, *event.held_out], window)
            case Ended():
                ended = self.windows[event.window]
                ended.ended, ended.back = event.reason, event.back
            case Candidate():
                parent = None
                if event.window is not None:
                    of = self.windows[event.window]
                    of.release, parent = event.release, of.parent
                    of.dropped = {int(i): reason for i, reason in event.dropped.items()}
                self.releases[event.release] = Release(
                    event.release, event.window, parent, event.folder, event.files, event.step, event.at
                )
            case Judged():
                release = self.releases[event.release]
                release.verdict, release.reason, release.sets = event.verdict, event.reason, event.sets
            case Served():
                if self.served is not None and self.served != event.release:
                    self.releases[self.served].status = "earlier"
                for number in event.withdrawn:
                    self.releases[number].status = "withdrawn"
                    self.releases[number].reason = f"rolled back to release {event.release}"
                now = self.releases[event.release]
                now.status, now.served_at, self.served = "served", event.at, event.release
            case Refused():
                self.releases[event.release].status = "refused"
                self.releases[event.release].reason = event.reason
            case Held():
                self.releases[event.release].status = "held"
                self.releases[event.release].reason = event.reason
            case Pinned():
                self.releases[event.release].pinned = event.pinned
            case Split():
                self.parts += event.parts
                self.windows[event.window].out.update(record for part in event.parts for record in part)
            case Released():
                for record in event.records:
                    self._window_of[record].out.add(record)

    @property
    def open_window(self) -> Window | None:
        return next((w for w in self.windows.values() if w.open), None)

    @property
    def undecided(self) -> Release | None:
        """The candidate that waits for the gate or for a person."""
        return next((r for r in self.releases.values() if r.status in ("candidate", "held")), None)

    def record(self, record: int, deleted: bool) -> RecordState:
        """Return the state of a record. deleted: the inbox has a deletion of it."""
        window = self._window_of.get(record)
        if window is None or record in window.out or (window.ended is not None and window.back):
            return RecordState("deleted") if deleted else RecordState("waiting")
        number = window.number
        if window.open:
            return RecordState("in window", number)
        if window.release is None:
            return RecordState("quarantined", number, None, window.ended or "")
        release = self.releases[window.release]
        if record in window.dropped:
            return RecordState("dropped", number, None, window.dropped[record])
        if release.status in GONE:
            return RecordState("quarantined", number, release.number, release.reason)
        return RecordState("held out" if record in window.held_out else "trained", number, release.number)

    def in_releases(self, record: int) -> list[int]:
        """Return the releases whose weights were trained on a record, also those that are not served any more."""
        first = [w.release for w in self.windows.values() if record in (*w.train, *w.replayed) and w.release]
        having = set(first)
        for release in sorted(self.releases.values(), key=lambda r: r.number):
            if release.parent in having:
                having.add(release.number)
        return sorted(having)

    def lineage(self, release: int) -> list[int]:
        """Return a release and those that it was trained from, the newest first."""
        line = [release]
        while (parent := self.releases[line[-1]].parent) is not None:
            line.append(parent)
        return line
