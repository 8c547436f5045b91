"""What may change when a run is continued."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from sdft.actors.shared.model_files import read_header
from sdft.services.algorithms.sdft import Sdft
from sdft.services.config.load import load_config
from sdft.services.planning.fingerprint import hashed_method
from sdft.services.planning.prepare import prepare
from tests.fakes.tiny import make_tiny_model
from tests.runs.run import write_run

AHEAD = "training.max_staleness=2"
NOT_HASHED = [
    "actors.student.health_timeout_s=9",
    "actors.batch_timeout_s=9",
    "actors.student.execution=eager",  # as null on a CPU
    "actors.student.tensor_parallel=1",
    "teacher.temperature=1",
    "evaluation.grading_timeout_s=9",
    "actors.student.cpus=2",
    "actors.teacher.labels={sdft: actors}",
    "actors.held_out={role: evaluation, replicas: 2}",
    "learner.ranks=2",
    "learner.gradient_checkpointing=true",
    "actors.student.gpu_memory_utilization=0.4",  # the default was a number
    "ray.gpu_memory_gib=80",
    "checkpoint.every=7",
    "evaluation.every=3",
    "monitoring.stall_s=9",
    "data.train=moved.jsonl",
    "ray.autoscaling=true",
    "weights.swap=one_by_one",
    "weights.transport=broadcast",
]
OF_THE_POOLS = [
    "actors.student.replicas=3",
    "actors.teacher.max_num_seqs=8",
    "actors.teacher.execution=compiled",
    "actors.teacher.engine=tests.fakes.echo_engine:EchoEngine",
]
OF_THE_RESULT = [
    "seed=5",
    "teacher.temperature=0.7",
    "learner.optimizer.lr=1e-4",
    "method.divergence.top_k=8",
    "method.divergence.clip=2",
    "method.divergence.support=student",
    "method.entropy=0.01",
    "method.length=8",
    "training.batch_size=2",
    "sampling.top_p=0.9",
    "data.template=paper",
    "data.system=Be brief.",
    "data.train=changed.jsonl",
]


def fingerprint(folder: Path, model: Path, *overrides: str) -> str:
    path = write_run(folder, model, "float32")
    rows = (folder / "train.jsonl").read_text()
    (folder / "moved.jsonl").write_text(rows)
    (folder / "changed.jsonl").write_text(rows.replace("The number is 8.", "The number was 8."))
    config = load_config(path, list(overrides))
    return prepare(config, folder / "tiny.yaml").stages[0].fingerprint


@pytest.mark.parametrize("override", NOT_HASHED)
def test_settings_without_effect_on_results_may_change(tiny_model: Path, tmp_path: Path, override: str) -> None:
    assert fingerprint(tmp_path, tiny_model, override) == fingerprint(tmp_path, tiny_model)


@pytest.mark.parametrize("override", [*OF_THE_RESULT, *OF_THE_POOLS, AHEAD])
def test_settings_that_change_the_bits_of_a_strict_run_may_not_change(
    tiny_model: Path, tmp_path: Path, override: str
) -> None:
    assert fingerprint(tmp_path, tiny_model, override) != fingerprint(tmp_path, tiny_model)


def test_an_engine_that_is_split_has_other_bits(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", pairs=2)
    assert fingerprint(tmp_path, model, "actors.student.tensor_parallel=2") != fingerprint(tmp_path, model)


def test_a_method_whose_options_are_off_is_hashed_as_before_there_were_options() -> None:
    assert hashed_method(Sdft().model_dump(mode="json")) == {
        "divergence": {"type": "forward", "top_k": 64},
        "skip_first": 3,
        "type": "sdft",
        "importance": {"level": "sequence", "cap": 2.0},
    }


@pytest.mark.parametrize("override", [*NOT_HASHED, *OF_THE_POOLS, "training.max_staleness=5"])
def test_a_run_ahead_may_change_its_pools_and_staleness(tiny_model: Path, tmp_path: Path, override: str) -> None:
    assert fingerprint(tmp_path, tiny_model, AHEAD, override) == fingerprint(tmp_path, tiny_model, AHEAD)


@pytest.mark.parametrize("override", [*OF_THE_RESULT, "training.max_staleness=0"])
def test_a_run_ahead_may_not_change_what_its_result_depends_on(tiny_model: Path, tmp_path: Path, override: str) -> None:
    assert fingerprint(tmp_path, tiny_model, AHEAD, override) != fingerprint(tmp_path, tiny_model, AHEAD)


@pytest.mark.usefixtures("unexamined")
def test_another_model_of_the_same_shape_may_not_take_its_place(tiny_model: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny_model, tmp_path / "moved"))
    other = make_tiny_model(tmp_path / "other", seed=1)
    assert (other / "config.json").read_bytes() == (moved / "config.json").read_bytes()
    assert fingerprint(tmp_path, moved) == fingerprint(tmp_path, tiny_model) != fingerprint(tmp_path, other)


def test_the_header_of_a_weight_file_is_read_when_it_is_checked_and_once_more(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> tuple[dict[str, Any], int]:
        read.append(path)
        return read_header(path)

    monkeypatch.setattr("sdft.services.planning.shape.read_header", counted)
    fingerprint(tmp_path, tiny_model)
    assert read == [tiny_model / "model.safetensors"] * 2
