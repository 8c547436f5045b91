"""The state of a service as text, read from its folder, while the service runs or not."""

import json
from collections.abc import Iterator
from pathlib import Path

from sdft.services.records.rows import StepMetrics, read_rows
from sdft.services.releases.journal import read_state
from sdft.services.releases.state import ServiceState
from sdft.services.serving.audit import audit_of
from sdft.services.serving.folder import SERVICE, ServiceFolder


def service_text(path: Path) -> str:
    """Return the lines for a terminal. Raises JournalDamaged or InboxDamaged."""
    folder = ServiceFolder(path)
    return "\n".join(_lines(folder, read_state(folder.journal)))


def _lines(folder: ServiceFolder, state: ServiceState) -> Iterator[str]:
    place = folder.path / SERVICE
    url = json.loads(place.read_text())["url"] if place.exists() else None
    yield f"service     {'does not run' if url is None else f'runs at {url}'}"
    if state.served is None:
        return
    served = state.releases[state.served]
    count = len(state.releases)
    yield f"release     {served.number} is served ({served.origin}); {count} releases, see `sdft releases`"
    if (undecided := state.undecided) is not None:
        yield f"candidate   release {undecided.number} is {undecided.status}; {undecided.reason}".rstrip("; ")
    if (window := state.open_window) is not None:
        run = folder.run(window.number)
        steps = read_rows(run, StepMetrics)
        done = f"step {steps[-1].step}" if steps else "its run has not begun"
        yield f"window      {window.number} trains {len(window.train)} new records: {done}, see `sdft status {run}`"
    audit = audit_of(folder.path)
    counts = ", ".join(f"{count} {name}" for name, count in audit.counts.items() if count)
    yield f"records     {audit.received} received{f': {counts}' if counts else ''}"
