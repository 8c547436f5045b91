"""Consecutive `sdft train` of one run: what a run resumes from, and what it sets aside."""

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from sdft.learner.group import LearnerGroup
from sdft.services.cli import train
from sdft.services.cli.main import main
from sdft.services.monitoring.console import Progress
from sdft.services.planning.prepared import Prepared
from sdft.services.records import checkpoints
from sdft.services.records.ledger import Ledger
from sdft.services.training.checkpointer import Checkpointer
from tests.fakes.tiny import TEMPLATE
from tests.runs.run import write_run

Run = Callable[[Prepared, Path, Path | None, Console], Coroutine[Any, Any, None]]


class Saved:
    """The learner's part of a checkpoint: writes nothing."""

    async def save(self, folder: Path) -> None: ...

    async def written(self) -> None: ...


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """The checkpoint that each run begins from. Instead of training, a run saves the next two checkpoints."""
    starts: list[Path | None] = []

    async def run(prepared: Prepared, run_dir: Path, start: Path | None, console: Console) -> None:
        starts.append(start)
        ledger, progress = Ledger(run_dir / "ledger.sqlite"), Progress(console, 6, "test")
        writer = Checkpointer(prepared, run_dir, cast(LearnerGroup, Saved()), ledger, progress)
        first = checkpoints.read_state(start).step if start else 0
        for step in (first + 1, first + 2):
            await writer.save(step, None)
            await writer.saved()
        ledger.close()

    monkeypatch.setattr(train, "run_session", run)
    return starts


def command(config: Path, *more: str) -> int:
    return main(["train", str(config), "--run-dir", str(config.parent / "run"), *more])


def dated(model: Path, folder: Path) -> Path:
    """Copy the model, with a chat template that writes the time: a different prompt at each rendering."""
    copy = Path(shutil.copytree(model, folder / "dated"))
    (copy / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + TEMPLATE)
    return copy


@pytest.mark.usefixtures("unexamined")
def test_a_resumed_run_keeps_the_date_in_its_prompts(
    tiny_model: Path, tmp_path: Path, started: list[Path | None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, dated(tiny_model, tmp_path), "float32", steps=8)
    assert (command(config), command(config), command(config)) == (0, 0, 0), capsys.readouterr().err
    folder = checkpoints.folder_of
    assert started == [None, folder(tmp_path / "run", 2), folder(tmp_path / "run", 4)]
    assert len({checkpoints.read_state(folder(tmp_path / "run", step)).begun for step in (5, 6)}) == 1
    # Another run that resumes from one of its checkpoints uses the same date.
    moved = Path(shutil.copytree(folder(tmp_path / "run", 5), tmp_path / "moved"))
    assert main(["train", str(config), "--run-dir", str(tmp_path / "other"), "--resume", str(moved)]) == 0
    assert main(["train", str(config), "--run-dir", str(tmp_path / "new")]) == 0
    assert started[3:] == [moved, None]


@pytest.mark.usefixtures("unexamined")
def test_runs_of_different_dates_have_different_prompts(
    tiny_model: Path, tmp_path: Path, started: list[Path | None]
) -> None:
    """Without this, the test above would show nothing."""
    config = write_run(tmp_path, dated(tiny_model, tmp_path), "float32")
    states = []
    for name in ("one", "two"):
        assert main(["train", str(config), "--run-dir", str(tmp_path / name)]) == 0
        states.append(checkpoints.read_state(checkpoints.folder_of(tmp_path / name, 2)))
    assert states[0].fingerprint != states[1].fingerprint


def test_a_damaged_checkpoint_is_set_aside_by_the_run_that_goes_on_before_it(
    tiny_model: Path, tmp_path: Path, started: list[Path | None], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run_dir = write_run(tmp_path, tiny_model, "float32"), tmp_path / "run"
    assert command(config) == 0
    (checkpoints.folder_of(run_dir, 2) / checkpoints.LEDGER).write_bytes(b"x")
    assert command(config, "--set", "checkpoint.keep=1") == 0
    said = capsys.readouterr().out
    assert f"{checkpoints.folder_of(run_dir, 2)} is damaged (ledger.sqlite is not as it was written)" in said
    (aside,) = (run_dir / "checkpoints").glob("aside-*-step-000002")
    assert f"is set aside as {aside}" in said
    assert list(checkpoints.folders(run_dir)) == [3]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-000003"


@pytest.mark.parametrize("refused", ["rename", "latest"])
def test_a_checkpoint_that_cannot_be_set_aside_is_a_sentence(
    refused: str,
    tiny_model: Path,
    tmp_path: Path,
    started: list[Path | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, folder = write_run(tmp_path, tiny_model, "float32"), tmp_path / "run" / "checkpoints"
    assert command(config) == 0
    (checkpoints.folder_of(tmp_path / "run", 2) / checkpoints.LEDGER).write_bytes(b"x")
    if refused == "latest":
        (folder / ".latest.part").mkdir()
    else:

        def rename(path: Path, target: Path) -> Path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(Path, "rename", rename)
    capsys.readouterr()
    assert command(config) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"sdft: {folder}: the checkpoints after step 1 cannot be set aside ([Errno ")
    assert said.endswith("; make the folder and the checkpoints in it writable, or name another --run-dir")
    assert started == [None]


def test_a_run_whose_checkpoints_could_not_be_written_does_not_begin(
    tiny_model: Path, tmp_path: Path, started: list[Path | None], capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = write_run(tmp_path, tiny_model, "float32"), tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    folder.symlink_to("/proc")
    assert command(config) == 2
    assert f"sdft: {folder}/step-000006: nothing can be written there" in capsys.readouterr().err
    assert started == []


def test_a_run_that_is_done_has_not_failed_because_its_output_takes_nothing(
    tiny_model: Path, tmp_path: Path, started: list[Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(tmp_path, tiny_model, "float32", steps=2)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command(config) == 0


def test_a_run_is_finished_even_if_its_report_cannot_be_written(
    tiny_model: Path, tmp_path: Path, started: list[Path | None], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, tiny_model, "float32", steps=2)
    (tmp_path / "run" / "report.html" / "file").mkdir(parents=True)
    assert command(config) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "finished"
    assert re.search(r"all steps are done and saved, but .* \(.*report.html", capsys.readouterr().out)
    assert command(config) == 0
    (tmp_path / "run" / "report.html" / "file").rmdir()
    (tmp_path / "run" / "report.html").rmdir()
    assert command(config) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert started == [None]


def test_a_run_whose_log_was_closed_behind_its_last_step_begins_once_more_to_evaluate(
    tiny_model: Path, tmp_path: Path, started: list[Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(tmp_path, tiny_model, "float32")
    log = tmp_path / "train.jsonl"
    rows = log.read_text().splitlines(keepends=True)
    log.write_text("".join(rows[:8]))  # two batches
    settings = ["data.source=log", "training.steps=null", "learner.optimizer.schedule=constant"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert command(config, *words) == 0
    log.write_text("".join([*rows[:8], '{"closed": true}\n']))

    async def evaluate(prepared: Prepared, run_dir: Path, start: Path | None, console: Console) -> None:
        starts.append(start)
        done = {"step": 2, "stage": 0, "task": "numbers", "metric": "accuracy", "value": 1.0, "n": 4}
        (run_dir / "eval.jsonl").write_text(json.dumps(done) + "\n")

    starts: list[Path | None] = []
    monkeypatch.setattr(train, "run_session", evaluate)
    assert (command(config, *words), command(config, *words)) == (0, 0)
    assert starts == [checkpoints.folder_of(tmp_path / "run", 2)]
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["state"], state["total_steps"]) == ("finished", 2)
