"""What a service keeps: weights of releases, and the states of runs."""

from pathlib import Path

from sdft.services.releases.state import UNDECIDED, ServiceState
from sdft.services.serving.folder import ServiceFolder


def unneeded(folder: ServiceFolder, state: ServiceState, keep: int) -> list[Path]:
    """Return the folders that may be removed: old releases, and checkpoints of windows that have ended.

    The newest `keep` releases stay, and the served one, the one before it, those that are pinned or not decided, and
    the first.
    """
    stay = {*sorted(state.releases)[-keep:], *state.lineage[:2], min(state.releases)}
    stay |= {r.number for r in state.releases.values() if r.pinned or r.status in UNDECIDED}
    found = [folder.release(number) for number in state.releases if number not in stay]
    for window in state.windows.values():
        decided = window.release is not None and state.releases[window.release].status not in UNDECIDED
        if decided or window.ended is not None:
            found.append(folder.run(window.number) / "checkpoints")
    return [path for path in found if path.is_dir()]
