"""Checkpoints that are damaged, cannot be read or cannot be removed: what is kept, and the notes that a run gets."""

import asyncio
import errno
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from ray.exceptions import RayTaskError
from rich.console import Console

from sdft.learner.group import LearnerGroup, LearnerLost
from sdft.services.base.errors import PreflightError, UserError
from sdft.services.base.failures import Losses
from sdft.services.config.sections import MonitoringConfig
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.sinks import Sinks
from sdft.services.records import checkpoints
from sdft.services.records.ledger import Ledger
from sdft.services.training.checkpointer import Checkpointer
from sdft.services.training.session import Session
from simulation.cluster import Case, prepared

STATE = checkpoints.CheckpointState(step=0, ranks=1, zero_stage=1, dtype="bfloat16", fingerprint="f")
FULL = OSError(errno.ENOSPC, "No space left on device")


def save(run_dir: Path, step: int, keep: int = 9) -> Path:
    run_dir.mkdir(exist_ok=True)
    part = checkpoints.begin(run_dir, step)
    (part / "weights").write_bytes(step.to_bytes(4) * 250)
    (part / checkpoints.LEDGER).write_bytes(b"")
    checkpoints.commit(part, run_dir, replace(STATE, step=step), keep)
    return checkpoints.folder_of(run_dir, step)


def spoil(folder: Path) -> None:
    (folder / "weights").write_bytes(b"\7" * 1000)


def unreadable(folder: Path) -> None:
    """Make reading the manifest fail with a system error, for root too."""
    (folder / checkpoints.MANIFEST).unlink()
    (folder / checkpoints.MANIFEST).symlink_to(checkpoints.MANIFEST)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def contents(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_of_later_steps_displace_no_good_one(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 100)
    for step in (200, 250):
        spoil(save(tmp_path, step))
    good = [save(tmp_path, step, keep) for step in (110, 120)]
    assert names(tmp_path) == [*(folder.name for folder in good[-keep:]), "step-000200", "step-000250"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000120"
    folder, notes = checkpoints.newest_usable(tmp_path)
    assert (folder, len(notes)) == (good[-1], 2)


def test_damaged_checkpoints_are_set_aside_when_a_run_goes_on_before_them(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 2), save(tmp_path, 4)
    spoil(bad)
    checkpoints.set_aside(tmp_path, after=2)
    assert checkpoints.newest_usable(tmp_path) == (good, [])
    assert (tmp_path / "checkpoints" / "latest").read_text() == good.name
    checkpoints.set_aside(tmp_path, after=0)
    assert not (tmp_path / "checkpoints" / "latest").exists()
    assert checkpoints.newest_usable(tmp_path) == (None, [])


@pytest.mark.parametrize("manifest", ["[]", '{"files": {"weights": 3}}', '{"files": []}', "{}"])
def test_an_invalid_manifest_is_damage(tmp_path: Path, manifest: str) -> None:
    folder = save(tmp_path, 2)
    (folder / checkpoints.MANIFEST).write_text(manifest)
    assert "its manifest.json cannot be read" in (checkpoints.damage(folder) or "")


def test_checkpoints_that_are_all_damaged_are_an_error_that_names_each(tmp_path: Path) -> None:
    for step in (2, 4):
        spoil(save(tmp_path, step))
    with pytest.raises(
        UserError, match=r"step-000004 is damaged \(weights .*step-000002 is damaged .*--resume PATH.*--run-dir"
    ):
        checkpoints.newest_usable(tmp_path)
    assert names(tmp_path) == ["step-000002", "step-000004"]


def test_an_unreadable_checkpoint_is_not_called_damaged(tmp_path: Path) -> None:
    save(tmp_path, 2)
    bad = save(tmp_path, 4)
    unreadable(bad)
    with pytest.raises(
        PreflightError, match=rf"{bad}/manifest.json cannot be read \(Too many levels of symbolic links\)"
    ):
        checkpoints.newest(tmp_path)
    root = tmp_path / "elsewhere" / "checkpoints"
    root.parent.mkdir()
    root.symlink_to("checkpoints")
    with pytest.raises(PreflightError, match=f"{root} cannot be read"):
        checkpoints.newest(root.parent)


class Learner:
    """The learner's part of a checkpoint. begun, done: what save() and written() raise."""

    def __init__(self, begun: Exception | None = None, done: Exception | None = None) -> None:
        self._begun, self._done = begun, done

    async def save(self, folder: Path) -> None:
        (folder / "half").write_bytes(b"1" * 1000)
        if self._begun is not None:
            raise self._begun

    async def written(self) -> None:
        if self._done is not None:
            raise self._done


def checkpointer_of(run_dir: Path, learner: Learner, timeout_s: float = 60) -> tuple[Checkpointer, io.StringIO]:
    """Return the checkpointer of a run of 3 steps that keeps one checkpoint, and its output."""
    one, log = prepared(Case("saving", engines=1, steps=3), 8), io.StringIO()
    settings = one.config.checkpoint.model_copy(update={"keep": 1, "timeout_s": timeout_s})
    one = replace(one, config=one.config.model_copy(update={"checkpoint": settings}))
    ledger, progress = Ledger(run_dir / "ledger.sqlite"), Progress(Console(file=log, width=400), 3, "test")
    return Checkpointer(one, run_dir, cast(LearnerGroup, learner), ledger, progress), log


async def saved(writer: Checkpointer, step: int) -> None:
    try:
        await writer.save(step, None)
        await writer.saved()
    finally:
        await writer.stop()


LATE = TimeoutError("waited 3600 s for the learner to begin saving")
GONE = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


@pytest.mark.parametrize("error", [LATE, GONE])
@pytest.mark.parametrize("call", ["begun", "done"])
def test_a_learner_that_does_not_answer_is_not_taken_for_a_full_disk(
    tmp_path: Path, call: str, error: Exception
) -> None:
    writer, log = checkpointer_of(tmp_path, Learner(**{call: error}))
    with pytest.raises(type(error), match=str(error.args[-1])):
        asyncio.run(saved(writer, 1))
    assert "could not be written" not in log.getvalue()


@pytest.mark.parametrize("error", [FULL, RayTaskError("save", "…", FULL).as_instanceof_cause()])
@pytest.mark.parametrize("call", ["begun", "done"])
def test_a_full_disk_is_a_note_and_the_partial_checkpoint_is_removed(
    tmp_path: Path, call: str, error: Exception
) -> None:
    writer, log = checkpointer_of(tmp_path, Learner(**{call: error}))
    asyncio.run(saved(writer, 1))
    lines = log.getvalue().splitlines()
    assert any("the checkpoint of step 1 could not be written ([Errno 28] No space left" in line for line in lines)
    assert [line for line in lines if line in ("training", "saving step 1")] == ["saving step 1", "training"]
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_commit_that_exceeds_its_time_limit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may rename its checkpoint after the run has chosen another one to resume from."""
    writer, _ = checkpointer_of(tmp_path, Learner(), timeout_s=0.1)
    commit = checkpoints.commit

    def slowly(*arguments: Any) -> tuple[Path, list[str]]:
        time.sleep(0.5)
        return commit(*arguments)

    async def stopped() -> None:
        await writer.save(1, None)
        await asyncio.sleep(0.05)
        await writer.stop()

    monkeypatch.setattr(checkpoints, "commit", slowly)
    with pytest.raises(TimeoutError, match=r"waited 0\.1 s for the newest checkpoint to be on the disk"):
        asyncio.run(stopped())


def block_latest(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "latest").unlink()
    (run_dir / "checkpoints" / "latest" / "file").mkdir(parents=True)


def block_removal(run_dir: Path) -> None:
    (run_dir / "checkpoints" / ".part-old-step-000002" / "file").mkdir(parents=True)


@pytest.mark.parametrize("block", [block_latest, block_removal])
def test_a_failure_after_a_checkpoint_has_its_name_is_a_note(tmp_path: Path, block: Callable[[Path], None]) -> None:
    """Also at the last step, at which a checkpoint that cannot be written ends the run."""
    writer, log = checkpointer_of(tmp_path, Learner())
    save(tmp_path, 2)

    async def last() -> None:
        await writer.save(3, None)
        block(tmp_path)
        await writer.saved()

    asyncio.run(last())
    assert "the checkpoint of step 3 is saved, but" in log.getvalue()
    assert checkpoints.newest(tmp_path)[0] == checkpoints.folder_of(tmp_path, 3)


def no_sinks(run_dir: Path) -> Sinks:
    return Sinks(run_dir, MonitoringConfig(tensorboard=False), print)


class LostOnce(Session):
    """A run whose learner is lost in the first try. tried: the checkpoint that each try begins from."""

    def __init__(self, run_dir: Path) -> None:
        log = Progress(Console(quiet=True), 3, "test")
        super().__init__(prepared(Case("lost", engines=1, steps=3), 8), run_dir, {}, log, None)
        self._learner = cast(LearnerGroup, self)
        self.tried: list[Path | None] = []

    def kill(self, hangs: bool = False) -> None: ...

    async def _start_learner(self) -> None: ...

    def _write_pids(self) -> None: ...

    async def _attempt(self, start: Path | None, sinks: Sinks, losses: Losses) -> None:
        self.tried.append(start)
        if len(self.tried) == 1:
            raise LearnerLost("learner rank 0 died")


def test_a_lost_learner_resumes_from_the_newest_good_checkpoint(tmp_path: Path) -> None:
    run, start = LostOnce(tmp_path), save(tmp_path / "another", 1)
    good, bad = save(tmp_path, 2), save(tmp_path, 4)
    spoil(bad)
    asyncio.run(run.run_attempts(start, no_sinks(tmp_path)))
    assert run.tried == [start, good]
    assert names(tmp_path) == [good.name]
    assert len(list((tmp_path / "checkpoints").glob("aside-*-step-000004"))) == 1


def test_before_its_first_checkpoint_a_lost_learner_resumes_from_the_start_of_the_run(tmp_path: Path) -> None:
    run, start = LostOnce(tmp_path / "run"), save(tmp_path / "another", 1)
    asyncio.run(run.run_attempts(start, no_sinks(tmp_path)))
    assert run.tried == [start, start]


@pytest.mark.parametrize(("harm", "error"), [(spoil, UserError), (unreadable, PreflightError)])
def test_without_a_good_checkpoint_the_run_ends_and_nothing_is_wiped(
    tmp_path: Path, harm: Callable[[Path], None], error: type[Exception]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    run, folder = LostOnce(tmp_path), save(tmp_path, 2)
    harm(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=str(folder)):
        asyncio.run(run.run_attempts(None, no_sinks(tmp_path)))
    assert run.tried == [None]
    assert sorted(tmp_path.rglob("*")) == before
