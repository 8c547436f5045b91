"""Which releases keep their weights."""

from pathlib import Path

from sdft.services.releases.state import ServiceState
from sdft.services.serving.folder import ServiceFolder


def unneeded(folder: ServiceFolder, state: ServiceState, keep: int) -> list[Path]:
    """Return the folders of old releases, which may be removed.

    The newest `keep` stay, and the served one, the one before it, those that are pinned or not decided, and the first.
    """
    stay = {*sorted(state.releases)[-keep:], *state.lineage[:2], min(state.releases)}
    stay |= {r.number for r in state.releases.values() if r.pinned or r.status in ("candidate", "held")}
    return [path for number in state.releases if number not in stay and (path := folder.release(number)).is_dir()]
