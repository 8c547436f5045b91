"""The audit of a service: each record is in one state, and trained as the ledgers of the windows say.

inbox, journal ─► state of each record ─┬─► counts, which add up to the records received
ledgers of the windows' runs ───────────┴─► faults: a record trained twice, or not as its state says
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sdft.services.inbox.lines import Deleted, Received, read_lines
from sdft.services.records.ledger_reading import trained_steps
from sdft.services.releases.journal import read_state
from sdft.services.releases.state import STATES
from sdft.services.serving.folder import ServiceFolder
from sdft.services.serving.window import record_name


@dataclass(frozen=True)
class Audit:
    received: int
    counts: dict[str, int]  # by state
    faults: list[str]


def audit_of(path: Path) -> Audit:
    """Read a service's folder, while the service runs or not."""
    folder = ServiceFolder(path)
    state = read_state(folder.journal)
    records: list[Received] = []
    deleted: set[int] = set()
    for line, _ in read_lines(folder.inbox) if folder.inbox.exists() else ():
        if isinstance(line, Deleted):
            deleted.add(line.id)
        else:
            records.append(line)
    states = {r.id: state.record(r.id, r.id in deleted) for r in records}
    faults = [] if [r.id for r in records] == list(range(len(records))) else ["the ids of the inbox have a gap"]
    new_in: dict[int, list[int]] = {}  # record -> windows of which it was a new record, and that count
    for window in state.windows.values():
        if window.release is None:
            continue
        run, rows = folder.run(window.number), [*window.train, *window.replayed]
        trained = {rows[i] for i in trained_steps(run) if i < len(rows)} if run.exists() else None
        for record in window.train:
            if record not in window.out:
                new_in.setdefault(record, []).append(window.number)
            if trained is not None and (record in trained) == (record in window.dropped):
                what = "was not trained" if record not in trained else "was trained, and counts as dropped"
                faults.append(f"window {window.number}: {record_name(record)} {what}")
        for record in window.held_out:
            if trained is not None and record in trained:
                faults.append(f"window {window.number}: {record_name(record)} is held out, and was trained")
    faults += [
        f"{record_name(i)} is a new record of windows {windows}" for i, windows in new_in.items() if len(windows) > 1
    ]
    counts: Counter[str] = Counter(s.state for s in states.values())
    return Audit(len(records), {name: counts[name] for name in STATES}, faults)
