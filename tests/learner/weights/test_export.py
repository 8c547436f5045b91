"""The student's folder: the files, names and shapes of the base model's folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sdft.actors.shared.model_files import INDEX, SINGLE, weight_files
from sdft.learner.config import LoraConfig
from sdft.learner.model.student import load_student, tied_names
from sdft.learner.weights.export import adapter_file, merge_adapter, student_files
from tests.fakes.folders import as_it_comes, change, configure, head_twice, shard, stored_in

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "m")


def exported(model: Path, dtype: torch.dtype, out: Path) -> Path:
    """Write the folder of a student whose weights are those of the model and one."""
    student = load_student(model, dtype)
    weights = {name: p.detach() + 1 for name, p in student.named_parameters()}
    for file in student_files(model, weights, tied_names(student), out):
        file.write()
    return out


def shapes(model: Path) -> dict[str, dict[str, torch.Size]]:
    return {path.name: {name: t.shape for name, t in load_file(path).items()} for path in weight_files(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_has_the_files_of_its_base(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    for name in ("merges.txt", "qwen.tiktoken", "tokenizer.model"):
        (model / name).write_text(name)
    as_it_comes(model)
    out = exported(model, dtype, tmp_path / "out")
    assert shapes(out) == shapes(model)
    assert {path.name for path in out.iterdir()} == {path.name for path in model.iterdir()}
    for name in ("merges.txt", "qwen.tiktoken", "tokenizer.model"):
        assert (out / name).read_text() == name
    index = json.loads((out / INDEX).read_text())
    tensors = {name: t for path in weight_files(out) for name, t in load_file(path).items()}
    assert index["weight_map"] == json.loads((model / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert torch.equal(tensors[HEAD], tensors[EMBEDDING])
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, out))
    assert after == before | {"dtype": str(dtype).removeprefix("torch.")}
    expected = load_student(model, dtype).get_parameter(EMBEDDING) + 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out, dtype=dtype).get_parameter(EMBEDDING), expected)


def test_a_tied_head_is_stored_as_often_as_in_the_base(model: Path, tmp_path: Path) -> None:
    once = load_file(exported(model, torch.float32, tmp_path / "once") / SINGLE)
    assert HEAD not in once
    head_twice(model)
    twice = load_file(exported(model, torch.float32, tmp_path / "twice") / SINGLE)
    assert torch.equal(twice[HEAD], once[EMBEDDING])
    change(model, lambda tensors: tensors.pop(EMBEDDING))  # stored only under the head's name
    head_only = load_file(exported(model, torch.float32, tmp_path / "head") / SINGLE)
    assert twice.keys() - head_only.keys() == {EMBEDDING}
    assert torch.equal(head_only[HEAD], once[EMBEDDING])


def test_a_tensor_that_is_no_parameter_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(model, lambda tensors: tensors.update({name: torch.full((32,), 7.0)}))
    assert load_file(exported(model, torch.bfloat16, tmp_path / "out") / SINGLE)[name].eq(7).all()


def test_an_adapter_is_merged_into_the_files_of_its_base(model: Path, tmp_path: Path) -> None:
    stored_in(model, torch.float16)
    shard(model)
    name = "model.layers.0.mlp.down_proj."
    adapters = {f"{name}lora_A.weight": torch.ones(2, 128), f"{name}lora_B.weight": torch.ones(128, 2)}
    adapter_file(model, adapters, LoraConfig(rank=2, targets=("down_proj",)), tmp_path / "adapter").write()
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert shapes(tmp_path / "out") == shapes(model)
    assert (tmp_path / "out" / INDEX).exists()


def test_a_base_whose_files_have_other_names_is_written_as_one_file(model: Path, tmp_path: Path) -> None:
    change(model, lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t)])
    shard(model)
    configure(model, dtype="float32")
    out = exported(model, torch.float32, tmp_path / "out")
    assert [path.name for path in weight_files(out)] == [SINGLE]
    assert EMBEDDING in load_file(out / SINGLE)
