"""The audit of a service: each record is in one state, and trained as the ledgers of the windows say.

inbox, journal ─► state of each record ─┬─► counts, which add up to the records received
ledgers of the windows' runs ───────────┴─► faults: a record trained twice, or not as its state says
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sdft.services.inbox.lines import Deleted, read_lines
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
    """Read a service's folder, while the service runs or not. Raises JournalDamaged or InboxDamaged."""
    folder = ServiceFolder(path)
    state = read_state(folder.journal)
    lines = [made for made, _ in read_lines(folder.inbox)] if folder.inbox.exists() else []
    deleted = {made.id for made in lines if isinstance(made, Deleted)}
    received = sum(len(made) for made in lines if isinstance(made, list))
    states = {i: state.record(i, i in deleted) for i in range(received)}
    faults: list[str] = []
    of_lineage: Counter[int] = Counter()
    for window in state.windows.values():
        if window.release is None:
            continue
        if window.release in state.lineage:
            of_lineage.update([*window.train, *window.held_out])
        run, rows = folder.run(window.number), [*window.train, *window.replayed]
        if not run.exists():
            continue
        trained = {rows[i] for i in trained_steps(run) if i < len(rows)}
        for record in window.train:
            if (record in trained) == (record in window.dropped):
                what = "was not trained" if record not in trained else "was trained, and counts as dropped"
                faults.append(f"window {window.number}: {record_name(record)} {what}")
        held_out = trained.intersection(window.held_out)
        faults += [f"window {window.number}: {record_name(i)} is held out, and was trained" for i in held_out]
    twice = [record for record, windows in of_lineage.items() if windows > 1]
    faults += [f"{record_name(record)} is new in several windows of the served release" for record in twice]
    counts: Counter[str] = Counter(s.state for s in states.values())
    return Audit(received, {name: counts[name] for name in STATES}, faults)
