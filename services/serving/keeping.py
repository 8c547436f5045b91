"""Which releases keep their weights."""

import shutil

from sdft.services.releases.state import ServiceState
from sdft.services.serving.folder import ServiceFolder


def prune(folder: ServiceFolder, state: ServiceState, keep: int) -> list[int]:
    """Remove the weights of old releases, and return their numbers.

    The newest `keep` stay, and the served one, the one before it, those that are pinned or not decided, and the first.
    """
    assert state.served is not None
    stay = {*sorted(state.releases)[-keep:], *state.lineage(state.served)[:2], min(state.releases)}
    stay |= {r.number for r in state.releases.values() if r.pinned or r.status in ("candidate", "held")}
    removed = []
    for number in state.releases:
        path = folder.release(number)
        if number not in stay and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            removed.append(number)
    return removed
