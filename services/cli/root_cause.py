"""The failure of a run as one sentence: the root cause, from the failed process's log if it is only there."""

import re
from collections.abc import Iterator
from pathlib import Path

from ray.exceptions import RayTaskError

from sdft.actors.gone import GONE
from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import WeightMismatch
from sdft.learner.group import LearnerLost
from sdft.services.base.errors import RunFailed

FAILED_CALL = re.compile(r"ray::(\w+)\.(\w+)(?:\(\))?(?:\x1b\[\d+m)* \(pid=(\d+)")  # head of a remote traceback in Ray
AN_ERROR = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]*(?:Error|Exception|Interrupt): \S.*")
# Messages that only report the failure of something else.
OPAQUE = re.compile(r"core initialization failed|see root cause|RayTaskError|EngineDead|serializable|pickle", re.I)
LONGEST = 400  # characters of a log line
PARTS = {"EngineWorker": "an engine", "LearnerWorker": "a learner process"}


def explained(error: Exception, run_dir: Path | None) -> RunFailed | None:
    """Return the failure of a process that the command started as a sentence; None for any other error.

    run_dir: the run directory with the logs; None: no logs were kept.
    """
    where = "" if run_dir is None else f"; logs: {run_dir / 'logs'}"
    if isinstance(error, WeightMismatch):
        return RunFailed(f"an engine refused its weights: {reason(error)}{where}")
    if isinstance(error, RayTaskError):
        call = FAILED_CALL.search(str(error))
        part = PARTS.get(call[1], "a process") if call else "a process"
        doing = "could not start" if call and call[2] == "start" else f"failed in {call[2]}" if call else "failed"
        why = reason(error)
        if OPAQUE.search(why):
            in_text = list(_errors(str(error)))
            in_log = None if run_dir is None else last_error(run_dir / "logs", int(call[3]) if call else None)
            why = in_text[-1] if in_text else in_log or why
        return RunFailed(f"{part} {doing}: {why}{where}")
    if isinstance(error, GONE):
        return RunFailed(f"a process of the run was lost: {reason(error)}{where}")
    if isinstance(error, LearnerLost | TimeoutError):
        return RunFailed(f"{error}{where}")
    return None


def last_error(logs: Path, pid: int | None) -> str | None:
    """Return the last line with an error in the newest start's log of the process; without a pid, in all its logs."""
    starts = sorted(logs.glob("ray-*"))
    if not starts:
        return None
    pattern = "worker-*" if pid is None else f"worker-*-{pid}.*"
    files = sorted(starts[-1].glob(pattern), key=lambda path: path.stat().st_mtime)
    found = [line for path in files for line in _errors(path.read_text(errors="replace"))]
    return found[-1] if found else None


def _errors(text: str) -> Iterator[str]:
    """Yield the errors in the lines of a log, except those that only report the failure of something else."""
    for line in text.splitlines():
        match = AN_ERROR.search(line)
        if match and not OPAQUE.search(match[0]):
            yield match[0][:LONGEST].strip()
