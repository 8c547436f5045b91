"""The training of a window: `sdft train` in a process of its own, which resumes where it was stopped.

    window.yaml ─► sdft train ─► run/ ─► sdft export ─► releases/NNNN ─► Candidate

The process has a lower priority than the engines that answer requests, and ends with the service.
"""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from sdft.actors.shared.process import die_with_parent
from sdft.services.base.digests import digests
from sdft.services.records.ledger_reading import dropped_records
from sdft.services.records.rows import StepMetrics, read_rows
from sdft.services.releases.events import Candidate
from sdft.services.releases.state import Window
from sdft.services.serving.folder import ServiceFolder

NICE = 10  # of the training's processes: requests come first
STOP_S = 40.0
LOG_LINES = 30


class TrainingFailed(Exception):
    """A window's run ended with an error. bad: the records or the settings cause it, so that it would fail again."""

    def __init__(self, text: str, bad: bool) -> None:
        super().__init__(text)
        self.bad = bad


async def train_window(
    sdft: Sequence[str],
    folder: ServiceFolder,
    window: int,
    config: Path,
    environment: Mapping[str, str],
    began: Callable[[int], None],
) -> None:
    """Train a window to its end. Raises TrainingFailed. If cancelled, the run is stopped, and resumes later.

    sdft: the command line of `sdft`. environment: variables for it, beside this process's own. began(pid) is called
    with the process of the run.
    """
    words = ("train", str(config), "--run-dir", str(folder.run(window)))
    await _command(sdft, words, folder.window(window) / "train.log", began, environment)


async def make_candidate(
    sdft: Sequence[str], folder: ServiceFolder, window: Window, release: int, began: Callable[[int], None]
) -> Candidate:
    """Export what a window has trained as a release. Raises TrainingFailed."""
    run, out, log = folder.run(window.number), folder.release(release), folder.window(window.number) / "train.log"
    shutil.rmtree(out, ignore_errors=True)  # of a service that was killed before it wrote the candidate down
    out.parent.mkdir(exist_ok=True)
    await _command(sdft, ("export", str(run), "--out", str(out)), log, began)
    files = await asyncio.to_thread(digests, out)
    steps = read_rows(run, StepMetrics)
    reasons = dropped_records(run, len(window.train))
    dropped = {str(window.train[index]): reason for index, reason in reasons.items()}
    place = str(out.relative_to(folder.path))
    return Candidate(release, window.number, place, files, steps[-1].step if steps else 0, dropped, time.time())


def forget_states(folder: ServiceFolder, window: int) -> None:
    """Remove the checkpoints of a window whose release is decided: the next window starts from a release."""
    shutil.rmtree(folder.run(window) / "checkpoints", ignore_errors=True)


async def _command(
    sdft: Sequence[str],
    words: tuple[str, ...],
    log: Path,
    began: Callable[[int], None],
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *sdft,
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            preexec_fn=_below_the_engines,
        )
        began(process.pid)
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
            raise
    if code != 0:
        lines = log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
        said = next((line for line in reversed(lines) if line.startswith("sdft: ")), lines[-1] if lines else "")
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise TrainingFailed(f"`sdft {words[0]}` ended with {how}: {said.removeprefix('sdft: ')[:500]}", code in (2, 4))


def _below_the_engines() -> None:
    die_with_parent(signal.SIGTERM)
    os.nice(NICE)
