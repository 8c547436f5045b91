"""Tensors that do not fit a model, and models that the learner cannot run, are refused before a start."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdft.actors.shared.model_files import SINGLE
from sdft.learner.config import LoraConfig
from sdft.learner.model.architecture import Untrainable, why_not
from sdft.learner.model.attention import packed_attention
from sdft.learner.model.examine import Examination, examine
from sdft.learner.model.faithful import unfaithful
from sdft.learner.model.forward import packs
from sdft.learner.model.stored import Stored
from sdft.learner.model.student import load_student
from sdft.learner.weights.content import Content
from sdft.learner.weights.lora import Lora
from sdft.learner.weights.publisher import Publisher
from sdft.services.base.errors import UserError
from sdft.services.cli.main import main
from sdft.services.planning.examined import examined
from sdft.services.planning.models import check_positions
from tests.fakes.families import make_family
from tests.runs.run import write_run

DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"
Tensors = dict[str, torch.Tensor]
FOUND = {"fault": None, "alone": None, "routed": False, "divides": False, "shared_by": [1]}
PASSES = f"import json; print(json.dumps({FOUND}))"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "m")


def change(model: Path, spoil: Callable[[Tensors], object]) -> None:
    tensors = load_file(model / SINGLE)
    spoil(tensors)
    save_file(tensors, model / SINGLE, {"format": "pt"})


def configure(model: Path, **settings: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))


def flawed(model: Path) -> bool:
    """Whether anything is found that keeps a model from training in packs."""
    return replace(examine(model, True), shared_by=(1,)) != Examination()


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "an untied head that is not there": (
        lambda model: configure(model, tie_word_embeddings=False),
        r"files lack lm_head\.weight, which config\.json describes, so they would be random; correct config\.json",
    ),
    "a layer's tensor that is not there": (
        lambda model: change(model, lambda tensors: tensors.pop(DOWN_PROJ)),
        rf"files lack {DOWN_PROJ}, which",
    ),
    "no embeddings": (
        lambda model: change(model, lambda tensors: tensors.pop("model.embed_tokens.weight")),
        r"files lack .*model\.embed_tokens\.weight|files lack lm_head\.weight and 1 more",
    ),
    "a tensor too many": (
        lambda model: change(model, lambda tensors: tensors.update({"model.layers.2.x": torch.ones(2)})),
        r"files hold model\.layers\.2\.x, which config\.json does not describe",
    ),
    "another shape": (
        lambda model: configure(model, intermediate_size=64),
        r"mlp\.down_proj\.weight has the shape \[128, 128\] and config\.json describes \[128, 64\]",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_tensors_that_do_not_fit_are_refused_before_the_start_and_at_it(name: str, model: Path) -> None:
    """`check` and `eval` examine in another process: test_check_and_eval_refuse_a_model_whose_head_would_be_random."""
    spoil, words = SPOILT[name]
    spoil(model)
    for trains in (True, False):  # True for sdft check and train, False for sdft eval
        assert re.search(words, examine(model, trains).fault or "")
    with pytest.raises(Untrainable, match=words):
        load_student(model, torch.float32)


def test_check_and_eval_refuse_a_model_whose_head_would_be_random(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, model, "float32")
    assert main(["check", str(config)]) == 0
    configure(model, tie_word_embeddings=False)
    for command in (["check", str(config)], ["eval", str(config), "--model", str(model)]):
        assert main(command) == 2
        assert "files lack lm_head.weight" in capsys.readouterr().err


def test_a_folder_that_passed_is_examined_again_once_it_has_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first examination is a real one. The others are processes of one line that find no fault."""
    begun: list[object] = []

    class Counted(subprocess.Popen):
        def __init__(self, command: list[str], **kwargs: Any) -> None:
            super().__init__([sys.executable, "-c", PASSES] if begun else command, **kwargs)
            begun.append(command)

    def examinations(trains: bool = True) -> int:
        before = len(begun)
        with examined(model, trains):
            pass
        return len(begun) - before

    monkeypatch.setattr(subprocess, "Popen", Counted)
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    assert (examinations(), examinations(), examinations(trains=False)) == (1, 0, 1)
    times, weights = (model / SINGLE).stat(), (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(weights)  # of the same size, and as if of the same time
    os.utime(model / SINGLE, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert examinations() == 1
    monkeypatch.setattr("sdft.services.planning.examined.version", lambda name: "another")
    assert examinations() == 1
    monkeypatch.setenv("SDFT_CACHE", "/proc")  # where nothing can be remembered
    assert (examinations(), examinations()) == (1, 1)


def test_tensors_that_transformers_ties_or_ignores_are_no_fault(model: Path) -> None:
    def more(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)

    change(model, more)
    assert not flawed(model)
    assert load_student(model, torch.float32).training


def test_a_separate_head_that_config_json_ties_is_refused(model: Path) -> None:
    change(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(Untrainable, match=r"hold lm_head\.weight with other values than model\.embed_tokens\.weight"):
        load_student(model, torch.float32)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("stablelm", {}, "do not pass the lengths of packed sequences to their attention"),
        ("nemotron", {}, "lengths of packed sequences"),
        ("bloom", {}, "do not use the attention interface"),
        ("gptj", {"rotary_dim": 32}, "do not work with the learner's attention"),
        ("mpt", {"d_model": 128, "n_heads": 2, "n_layers": 2}, "do not work with the learner's attention"),
        ("doge", {}, "its attention uses a mask of its own"),
        (
            "minimax",
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            "layers of the type linear_attention carry something",
        ),
    ],
)
def test_a_model_that_does_not_pack_is_computed_one_by_one(
    family: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    found = examine(make_family(tmp_path, family, **settings), True)
    assert found.fault is None
    assert words in (found.alone or "")
    model = load_student(tmp_path, torch.float32)
    assert not packs(model)
    assert unfaithful(model) is None
    assert examine(tmp_path, False) == Examination()  # engines have their own implementations of the models


@pytest.mark.parametrize(
    ("family", "settings", "ranks"),
    [
        ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}, (1, 2, 6)),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}, (1, 2, 4)),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, (1,)),
    ],
)
def test_the_numbers_of_ranks_that_can_divide_the_tokens(
    family: str, settings: dict[str, Any], ranks: tuple[int, ...], tmp_path: Path
) -> None:
    assert examine(make_family(tmp_path, family, pad_token_id=0, **settings), True).shared_by == ranks


def test_a_model_whose_attention_reads_later_tokens_is_refused(tmp_path: Path) -> None:
    make_family(tmp_path, "gemma3_text", use_bidirectional_attention=True)
    assert "its attention uses later tokens" in (examine(tmp_path, True).fault or "")
    with pytest.raises(Untrainable, match="later tokens"):
        load_student(tmp_path, torch.float32)


def test_a_configuration_that_describes_no_model_is_refused(model: Path) -> None:
    configure(model, pad_token_id=100_000)  # outside the vocabulary
    assert "cannot build the model that its config.json describes (AssertionError: Padding_idx" in (
        examine(model, True).fault or ""
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "olmo3", "phi3", "seed_oss", "gpt2"])
def test_a_model_that_the_learner_can_run_is_not_refused(family: str, tmp_path: Path) -> None:
    assert not flawed(make_family(tmp_path, family, pad_token_id=0))


def test_a_model_whose_window_is_not_passed_to_attention_does_not_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a model that applies the window only in its mask, which the learner does not compute."""
    from transformers.models.mistral import modeling_mistral

    make_family(tmp_path, "mistral", sliding_window=8, pad_token_id=0)
    own = modeling_mistral.MistralAttention.forward

    def forward(self: torch.nn.Module, *given: object, **named: object) -> object:
        self.config.sliding_window = None
        try:
            return own(self, *given, **named)
        finally:
            self.config.sliding_window = 8

    assert examine(tmp_path, True).alone is None
    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", forward)
    assert "do not pass the window" in (examine(tmp_path, True).alone or "")


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 32,
    "long_factor": [2.0] * 32,
    "original_max_position_embeddings": 256,
}


def test_positions_that_depend_on_the_longest_of_a_pack_are_refused(tmp_path: Path) -> None:
    make_family(tmp_path, "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=256, pad_token_id=0)
    check_positions(tmp_path, 256)
    with pytest.raises(UserError, match=r"257 tokens, but beyond 256 .*\(longrope\).*lower data\.max_teacher"):
        check_positions(tmp_path, 257)
    make_family(tmp_path, "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert "rope_type is dynamic" in (why_not(tmp_path) or "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized (quantization_config in config.json)"),
        (
            {"hidden_size": "128"},
            "does not support the model that its config.json describes (Validation error for field 'hidden_size'",
        ),
    ],
)
def test_a_configuration_that_cannot_be_trained_is_refused(
    settings: dict[str, object], words: str, model: Path
) -> None:
    configure(model, **settings)
    assert words in (why_not(model) or "")


def test_attention_refuses_what_it_does_not_compute() -> None:
    q = torch.ones(1, 1, 3, 2)
    module = torch.nn.Module()
    harmless = {"position_ids": q, "use_cache": False, "softcap": None}
    out, _ = packed_attention(module, q, q, q, None, lengths=(2, 1), **harmless)
    assert torch.equal(out, torch.ones(1, 3, 1, 2))
    for wrong, words in (({"alibi": q}, "alibi"), ({"is_causal": False}, "later tokens")):
        with pytest.raises(Untrainable, match=words):
            packed_attention(module, q, q, q, None, lengths=(2, 1), **wrong)
    with pytest.raises(Untrainable, match="a mask of its own"):
        packed_attention(module, q, q, q, q, lengths=(2, 1))
    with pytest.raises(Untrainable, match="lengths of packed sequences"):
        packed_attention(module, q, q, q, None)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", DOWN_PROJ])
def test_weights_without_one_of_the_models_are_not_published(name: str, tiny_model: Path) -> None:
    publisher = Publisher(tiny_model, torch.float32, np.arange(5, dtype=np.int32), "")
    tensors = load_file(tiny_model / SINGLE)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    whole = publisher.publish("student", 0, Content(tensors.items(), nbytes))
    assert np.isfinite(whole.probe_logprobs).all()
    del tensors[name]
    with pytest.raises(ValueError, match=rf"lack ({name}|lm_head)"):
        publisher.publish("student", 1, Content(tensors.items(), nbytes))


def test_adapters_need_weights_of_the_names_that_they_are_merged_by(model: Path) -> None:
    change(
        model,
        lambda tensors: [tensors.update({name.removeprefix("model."): tensors.pop(name)}) for name in list(tensors)],
    )
    assert not flawed(model)  # transformers finds them in spite of the names
    student = load_student(model, torch.float32)
    with pytest.raises(Untrainable, match=r"have no weight .*layers\.0\..*, and adapters are merged by name"):
        Lora(student, LoraConfig(rank=2), model, torch.float32, Stored(student))
