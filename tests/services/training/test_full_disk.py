"""A full disk ends a run with one sentence, and all files are closed. Only the last checkpoint must be written."""

import asyncio
import errno
import io
import json
import sqlite3
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from sdft.learner.group import LearnerGroup
from sdft.services.base.errors import PreflightError
from sdft.services.cli import train
from sdft.services.config.load import load_config
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.prepare import prepare
from sdft.services.records.ledger import Ledger
from sdft.services.records.rows import Reply
from sdft.services.training.checkpointer import Checkpointer
from tests.runs.run import write_run


def full_ledger() -> sqlite3.OperationalError:
    """Return the error that sqlite raises on a full disk."""
    db = sqlite3.connect(":memory:")
    db.executescript("PRAGMA max_page_count = 4; CREATE TABLE t (x);")
    with pytest.raises(sqlite3.OperationalError) as caught:
        db.execute("INSERT INTO t VALUES (zeroblob(100000))")
    db.close()
    return caught.value


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), full_ledger()])
def test_a_full_disk_ends_the_run_with_one_sentence(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config, run_dir = write_run(tmp_path, tiny_model, "float32"), tmp_path / "run"

    async def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "run_session", run)
    with pytest.raises(
        PreflightError, match=rf"{run_dir}: the disk takes no more \(.*\); free space .* repeat the command"
    ):
        train.train(prepare(load_config(config), config), run_dir, "auto", Console(quiet=True))
    assert json.loads((run_dir / "run.json").read_text())["state"] == "failed"


def test_a_full_disk_leaves_no_file_open(tmp_path: Path) -> None:
    """/dev/full fails at a write and at the close."""
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        log.reply(Reply(0, "task", "1", "?", "!", "!", True))
    with pytest.raises(OSError, match="No space left"):
        log.close()
    assert all(file.closed for file in log._files.values())


def test_of_failed_checkpoints_only_the_last_ends_the_run(tiny_model: Path, tmp_path: Path) -> None:
    config, run_dir = write_run(tmp_path, tiny_model, "float32"), tmp_path / "run"
    prepared, out = prepare(load_config(config), config), io.StringIO()
    last = prepared.schedule.total_steps
    assert last is not None
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("")  # blocks the folder: nothing can be written, and no learner is needed
    progress = Progress(Console(file=out, width=400), last, "test")
    checkpoints = Checkpointer(prepared, run_dir, cast(LearnerGroup, None), cast(Ledger, None), progress)
    asyncio.run(checkpoints.save(last - 1, None))
    assert f"the checkpoint of step {last - 1} could not be written" in out.getvalue()
    with pytest.raises(PreflightError, match=f"the checkpoint of step {last} could not be written .* make room"):
        asyncio.run(checkpoints.save(last, None))
