"""Files written for others to read have the permissions of the umask, whatever those of their sources."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdft.learner.config import LoraConfig
from sdft.learner.weights.export import BaseModelGone, adapter_file, merge_adapter, student_files
from sdft.services.cli.main import main
from sdft.services.cluster.cluster import _keep_logs
from sdft.services.planning import models
from sdft.services.records import checkpoints
from sdft.services.records.ledger import Ledger, restore_ledger

WEIGHTS = {"weight": torch.zeros(4)}


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_usual(folder: Path, umask: int) -> None:
    """Check that every file and folder in it has the permissions of a new one."""
    modes = {path: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert any(path.is_file() for path in modes)
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}


def closed(folder: Path, model: Path) -> Path:
    """Return a copy of a model folder that only its owner may read."""
    folder.mkdir(mode=0o700)
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).chmod(0o400)
    return folder


def test_permissions_of_a_saved_student_and_its_export(tiny_model: Path, tmp_path: Path, umask: int) -> None:
    run_dir, base = tmp_path / "run", closed(tmp_path / "base", tiny_model)
    run_dir.mkdir()
    part = checkpoints.begin(run_dir, 1)
    (weights,) = student_files(base, WEIGHTS, {}, part / "student")
    weights.write()
    checkpoints.commit(part, run_dir, checkpoints.CheckpointState(1, 1, 1, "float32", "f"), keep=1)
    folder = checkpoints.folder_of(run_dir, 1)
    assert_usual(folder, umask)
    for path in (folder / "student").iterdir():  # permissions of files from other versions
        path.chmod(0o600)
    (folder / "student").chmod(0o700)
    assert main(["export", str(run_dir), "--out", str(tmp_path / "out")]) == 0
    assert_usual(tmp_path / "out", umask)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in (folder / "student").iterdir()}


def test_permissions_of_a_saved_adapter_and_the_merged_model(tiny_model: Path, tmp_path: Path, umask: int) -> None:
    base, name = closed(tmp_path / "base", tiny_model), "model.layers.0.mlp.down_proj."
    adapters = {f"{name}lora_A.weight": torch.zeros(2, 128), f"{name}lora_B.weight": torch.zeros(128, 2)}
    adapter_file(base, adapters, LoraConfig(rank=2, targets=("down_proj",)), tmp_path / "adapter").write()
    assert_usual(tmp_path / "adapter", umask)
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert_usual(tmp_path / "out", umask)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):  # the error does not name the base model
        merge_adapter(tmp_path / "adapter", tmp_path / "again")
    base.rename(tmp_path / "moved")
    with pytest.raises(BaseModelGone, match=str(base)):
        merge_adapter(tmp_path / "adapter", tmp_path / "again")


def test_permissions_of_a_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    def make(out: Path) -> None:
        (out / "config.json").write_text(json.dumps({}))

    monkeypatch.setitem(models.BUILT_IN, "tiny", make)
    models.materialise("tiny", tmp_path / "made" / "tiny")
    assert_usual(tmp_path / "made", umask)


def test_permissions_of_a_ledger_restored_from_a_read_only_checkpoint(tmp_path: Path, umask: int) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    Ledger(tmp_path / "copy").close()
    (tmp_path / "copy").chmod(0o400)
    restore_ledger(tmp_path / "copy", run_dir / "ledger.sqlite")
    assert_usual(run_dir, umask)


def test_permissions_of_rays_logs(tmp_path: Path, umask: int, capsys: pytest.CaptureFixture[str]) -> None:
    """In folders that everybody may write to. Only files are copied, and a full disk gives one line."""
    source = tmp_path / "ray" / "session_2026" / "logs"
    for name in ("worker.out", "events/a.log", "old/gone.log"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
        (source / name).parent.chmod(0o777)
    os.mkfifo(source / "pipe")
    _keep_logs(tmp_path / "ray", tmp_path / "logs")
    (kept,) = (tmp_path / "logs").iterdir()
    assert {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()} == {"worker.out", "events/a.log"}
    assert_usual(tmp_path / "logs", umask)
    (tmp_path / "file").write_text("")
    _keep_logs(tmp_path / "ray", tmp_path / "file")
    assert "Ray's logs could not be kept in" in capsys.readouterr().err
