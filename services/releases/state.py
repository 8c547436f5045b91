"""The state of a service: what its decisions add up to.

    record    waiting ─► in a window ─┬─► trained ──► in a release
                 ▲                    ├─► held out     (asked by the gate, never trained)
                 │                    └─► dropped      (the run could not train it)
                 └── the window ended without a release, or the record was let out of quarantine

    release   candidate ─┬─► served ─► earlier ─► withdrawn
                         ├─► canary ─► served, held or refused
                         ├─► held ─► served or refused
                         └─► refused

The served release and those that it was trained from are its lineage. A record is trained if a window of the lineage
trained it. A release that leaves the lineage is withdrawn, and the records that only it has are quarantined. A window
or a candidate that began from another release than the one that is served now ends, and its records wait again.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sdft.services.releases.events import (
    Canary,
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
)

ReleaseStatus = Literal["candidate", "canary", "held", "served", "earlier", "refused", "withdrawn"]
RecordStatus = Literal["waiting", "in window", "trained", "held out", "dropped", "quarantined", "deleted"]
STATUSES: tuple[str, ...] = get_args(ReleaseStatus)
STATES: tuple[str, ...] = get_args(RecordStatus)
UNDECIDED, GONE = ("candidate", "canary", "held"), ("refused", "withdrawn")  # statuses of releases


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
    back: bool = False  # its records wait again
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
    canary_at: float | None = None  # when it began to answer a share of the users
    pinned: bool = False

    @property
    def origin(self) -> str:
        """What it was made by, for people."""
        return "the model as started" if self.window is None else f"window {self.window}, {self.step} steps"


@dataclass(frozen=True)
class RecordState:
    """Where a record is. reason: of a dropped or quarantined one."""

    state: RecordStatus
    window: int | None = None
    release: int | None = None
    reason: str = ""


class ServiceState:
    """Windows, releases and records, from the decisions so far."""

    def __init__(self) -> None:
        self.windows: dict[int, Window] = {}
        self.releases: dict[int, Release] = {}
        self.served: int | None = None
        self.lineage: tuple[int, ...] = ()  # of the served release, the newest first
        self.decisions = 0
        self.parts: list[list[int]] = []  # records of refused windows that wait for windows of their own
        self._new_in: dict[int, list[int]] = {}  # record -> windows that it was a new record of
        self._trained_in: dict[int, list[int]] = {}  # record -> windows that trained it, also as a replayed one

    def apply(self, event: Event) -> None:
        """Take one more decision."""
        self.decisions += 1
        match event:
            case Opened():
                self._open(event)
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
                self._serve(event)
            case Refused():
                refused = self.releases[event.release]
                refused.status, refused.reason = "refused", event.reason
                if refused.window is not None:
                    self.windows[refused.window].out.update(record for part in event.parts for record in part)
                self.parts += event.parts
            case Held():
                self.releases[event.release].status = "held"
                self.releases[event.release].reason = event.reason
            case Canary():
                self.releases[event.release].status = "canary"
                self.releases[event.release].canary_at = event.at
            case Pinned():
                self.releases[event.release].pinned = event.pinned
            case Released():
                for record in event.records:
                    self.windows[self._new_in[record][-1]].out.add(record)

    def _open(self, event: Opened) -> None:
        window = Window(event.window, event.parent, event.train, event.held_out, event.replayed, event.at)
        self.windows[event.window] = window
        new = {*event.train, *event.held_out}
        self.parts = [part for part in self.parts if not new.intersection(part)]
        for record in new:
            self._new_in.setdefault(record, []).append(event.window)
        for record in (*event.train, *event.replayed):
            self._trained_in.setdefault(record, []).append(event.window)

    def _serve(self, event: Served) -> None:
        before, self.served, self.lineage = self.lineage, event.release, self._line(event.release)
        now = self.releases[event.release]
        now.served_at = event.at
        for number in before:
            if number not in self.lineage:
                self.releases[number].status = "withdrawn"
                self.releases[number].reason = f"release {event.release} is served instead (by {event.by})"
        for number in self.lineage[1:]:
            self.releases[number].status = "earlier"
        now.status = "served"
        other = f"it began from another release than {event.release}, which is served now"
        for window in self.windows.values():
            if window.open and window.parent != event.release:
                window.ended, window.back = other, True
        for release in self.releases.values():
            if release.status in UNDECIDED and release.parent != event.release:
                release.status, release.reason = "refused", other
                if release.window is not None:
                    self.windows[release.window].back = True

    @property
    def open_window(self) -> Window | None:
        return next((w for w in self.windows.values() if w.open), None)

    @property
    def undecided(self) -> Release | None:
        """The candidate that waits for the gate, for feedback or for a person."""
        return next((r for r in self.releases.values() if r.status in UNDECIDED), None)

    def record(self, record: int, deleted: bool) -> RecordState:
        """Return the state of a record. deleted: the inbox has a deletion of it."""
        numbers = self._new_in.get(record, [])
        inside = next((n for n in numbers if self.windows[n].release in self.lineage), None)
        window = self.windows[inside if inside is not None else numbers[-1]] if numbers else None
        if window is None or (inside is None and (record in window.out or window.back)):
            return RecordState("deleted") if deleted else RecordState("waiting")
        if window.open:
            return RecordState("in window", window.number)
        if window.release is None:
            return RecordState("quarantined", window.number, None, window.ended or "")
        release = self.releases[window.release]
        if record in window.dropped:
            return RecordState("dropped", window.number, None, window.dropped[record])
        if release.status in GONE:
            return RecordState("quarantined", window.number, release.number, release.reason)
        return RecordState("held out" if record in window.held_out else "trained", window.number, release.number)

    def in_releases(self, record: int) -> list[int]:
        """Return the releases whose weights were trained on a record, also those that are not served any more."""
        having = {self.windows[n].release for n in self._trained_in.get(record, ())}
        if not having:
            return []
        for release in sorted(self.releases.values(), key=lambda r: r.number):
            if release.parent in having:
                having.add(release.number)
        return sorted(number for number in having if number is not None)

    def _line(self, release: int) -> tuple[int, ...]:
        line = [release]
        while (parent := self.releases[line[-1]].parent) is not None:
            line.append(parent)
        return tuple(line)
