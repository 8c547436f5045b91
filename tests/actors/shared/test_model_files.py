"""The files of a model folder: which files are read, and the error for incomplete ones."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from sdft.actors.shared.adapters import merged
from sdft.actors.shared.model_files import ADAPTER_CONFIG, INDEX, SINGLE, weight_files
from sdft.services.base.errors import UserError
from sdft.services.cli.main import main
from sdft.services.planning.models import DOWNLOADED, NOT_DOWNLOADED, resolve_model
from sdft.services.planning.shape import ModelShape, read_headers, sample_of_weights
from sdft.services.records import checkpoints
from tests.fakes.folders import shard

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1000\n"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_model, tmp_path / "m")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block without root's rights, so that file permissions apply."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_shards_are_read_as_one_model_and_other_files_are_ignored(tiny_model: Path, model: Path) -> None:
    headers = read_headers(tiny_model)
    whole, bytes_before = ModelShape.of(tiny_model, headers), sample_of_weights(headers)
    files = shard(model)
    shutil.copy(tiny_model / SINGLE, model / "consolidated.safetensors")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, model / "adapter_model.safetensors")
    assert weight_files(model) == files
    assert ModelShape.of(resolve_model(str(model), model), read_headers(model)) == whole
    assert sample_of_weights(read_headers(model)) == bytes_before
    assert {name for name, _ in merged(model, {}, 1.0, torch.float32)} == set(load_file(tiny_model / SINGLE))


def spoil_header(model: Path) -> None:
    (model / SINGLE).write_bytes(struct.pack("<Q", 9) + b'{"a": 1}}' + bytes(100))


def spoil_index(model: Path) -> None:
    shard(model)
    (model / INDEX).write_text('{"weight_map": {')


def lose_a_shard(model: Path) -> None:
    shard(model)[1].unlink()


def two_sets(model: Path) -> None:
    whole = (model / SINGLE).read_bytes()
    shard(model)
    (model / SINGLE).write_bytes(whole)


def other_name(model: Path) -> None:
    (model / SINGLE).rename(model / "pytorch_model.safetensors")


def beside(name: str) -> Callable[[Path], object]:
    return lambda model: shutil.copy(model / SINGLE, model / name)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


SPOILT: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a pointer": (write(SINGLE, LFS), [SINGLE, "Git LFS pointer", "git lfs pull"]),
    "an empty file": (write(SINGLE, b""), [SINGLE, "is empty", "download it again"]),
    "a few bytes": (write(SINGLE, b"abc"), [SINGLE, "is incomplete", "download it again"]),
    "half a file": (
        lambda model: os.truncate(model / SINGLE, (model / SINGLE).stat().st_size // 2),
        [SINGLE, "bytes and its header describes", "download it again"],
    ),
    "half a header": (lambda model: os.truncate(model / SINGLE, 100), [SINGLE, "is incomplete"]),
    "another header": (spoil_header, [SINGLE, "no valid safetensors header"]),
    "a missing shard": (lose_a_shard, ["model-00002-of-00002.safetensors is missing", INDEX]),
    "half an index": (spoil_index, [INDEX, "not valid JSON"]),
    "an index of nothing": (write(INDEX, b"{}"), [INDEX, "no weight_map"]),
    "a file and shards": (two_sets, [f"holds {SINGLE}, and an index of other files"]),
    "a second file": (beside("consolidated.safetensors"), ["consolidated.safetensors lies beside", "another folder"]),
    "an adapter": (write(ADAPTER_CONFIG, b"{}"), [ADAPTER_CONFIG, "an adapter in place of"]),
    "another name": (other_name, ["there is pytorch_model.safetensors"]),
    "half a configuration": (write("config.json", b'{"model_type": "qw'), ["config.json is not valid JSON"]),
    "no configuration": (write("config.json", b"[]"), ["config.json holds no JSON object"]),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_incomplete_or_damaged_folder_is_an_error_of_one_sentence(name: str, model: Path) -> None:
    spoil, words = SPOILT[name]
    spoil(model)
    with pytest.raises(UserError, match=r"^model: ") as error:
        resolve_model(str(model), model)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_file_that_may_not_be_read_is_named(name: str, model: Path) -> None:
    for folder in (model, *model.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)
    (model / name).chmod(0)
    with unprivileged(), pytest.raises(UserError, match=rf"{name} cannot be read \(Permission denied\)"):
        resolve_model(str(model), model)


def test_a_folder_that_may_not_be_read_is_named(model: Path) -> None:
    for folder in list(model.parents)[:3]:
        folder.chmod(0o755)
    model.chmod(0)
    with (
        unprivileged(),
        pytest.raises(UserError, match=r"m cannot be read \(Permission denied\); check"),
    ):
        resolve_model(str(model), model)
    model.chmod(0o755)


def test_an_adapter_whose_base_is_damaged_is_not_exported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = checkpoints.begin(tmp_path, 1)
    student = part / "student"
    student.mkdir()
    settings = {"base_model_name_or_path": str(model), "r": 1, "lora_alpha": 1}
    (student / ADAPTER_CONFIG).write_text(json.dumps(settings))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 2)}, student / "adapter_model.safetensors")
    checkpoints.commit(part, tmp_path, checkpoints.CheckpointState(1, 1, 1, "float32", "f"), keep=1)
    os.truncate(model / SINGLE, 100)
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"{SINGLE} is incomplete" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_download_has_all_files_of_a_model_and_no_duplicates() -> None:
    needed = ["config.json", "merges.txt", "qwen.tiktoken", "tokenizer.model", "chat_template.jinja", SINGLE]
    others = ["original/params.json", "original/model.safetensors", "consolidated.safetensors", "onnx/model.onnx"]
    taken = filter_repo_objects(needed + others, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED)
    assert list(taken) == needed
