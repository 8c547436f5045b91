"""The learner's forward is compared with the model's own at a start: a model that is random or incomplete is
refused."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdft.learner.loss.scaling import LogitScaling
from sdft.learner.model.attention import PACKED
from sdft.learner.model.faithful import unfaithful
from sdft.learner.model.student import load_student
from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config
from sdft.services.planning.prepare import prepare
from sdft.services.training.learner import start_learner
from tests.fakes.families import make_family
from tests.runs.run import write_run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_faithful_model_is_left_as_it_was(tiny_model: Path, dtype: torch.dtype) -> None:
    model = load_student(tiny_model, dtype)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    assert unfaithful(model) is None
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        place, values = before[name]
        assert parameter.dtype == dtype
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, values)
        assert parameter.grad is None
    assert model.training
    assert model.config._attn_implementation == PACKED


LEFT_OUT = "does not compute a part of it: its log-probs differ by up to"
DROPOUT: dict[str, dict[str, float]] = {
    "seed_oss": {"attention_dropout": 0.1, "residual_dropout": 0.2},
    "opt": {"dropout": 0.3, "attention_dropout": 0.1, "layerdrop": 0.9},
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "gpt_neox": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
}


@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_is_off_in_training_wherever_a_model_has_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"pad_token_id": 0, "ffn_dim": 128, "word_embed_proj_dim": 128} | DROPOUT[family]
    make_family(tmp_path, family, **settings)
    assert unfaithful(load_student(tmp_path, torch.float32)) is None
    monkeypatch.setattr("sdft.learner.model.student.without_dropout", lambda model: None)
    assert "different outputs each time" in (unfaithful(load_student(tmp_path, torch.float32)) or "")


def test_without_memory_for_float32_a_model_is_compared_in_its_own_dtype(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdft.learner.model.faithful.available_memory_gib", lambda: 0.0)
    monkeypatch.setattr("sdft.learner.model.faithful._in_float32", None)
    model = load_student(tiny_model, torch.bfloat16)
    assert unfaithful(model) is None
    model.base_model.norm.register_forward_hook(lambda *given: given[2] * (1 if model.training else 2))
    assert "does not compute a part of it" in (unfaithful(model) or "")


def packed(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED).train()


HEADS: dict[str, dict[str, Any]] = {
    "minicpm3": {"dim_model_base": 32, "num_key_value_heads": 2},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "gemma2": {"final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("family", HEADS)
def test_a_head_with_a_scale_or_a_cap_is_computed_and_left_out_it_is_unfaithful(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"pad_token_id": 0} | HEADS[family]
    make_family(tmp_path, family, **settings)
    assert unfaithful(load_student(tmp_path, torch.float32)) is None
    monkeypatch.setattr(LogitScaling, "apply_", lambda self, logits: logits)
    assert LEFT_OUT in (unfaithful(load_student(tmp_path, torch.float32)) or "")


def test_attention_over_the_whole_pack_is_unfaithful(tmp_path: Path) -> None:
    """Bloom has its own attention, so it does not pack. Here it stands for a model that no examination finds."""
    assert LEFT_OUT in (unfaithful(packed(make_family(tmp_path, "bloom"))) or "")


def test_values_may_be_narrower_than_keys(tmp_path: Path) -> None:
    """As in multi-head latent attention."""
    wide = {"num_key_value_heads": 2, "head_dim": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 16}
    assert unfaithful(load_student(make_family(tmp_path, "youtu", **wide), torch.float32)) is None


def test_a_forward_that_fails_is_unfaithful(tmp_path: Path) -> None:
    assert "do not pass the lengths of packed sequences" in (
        unfaithful(packed(make_family(tmp_path, "stablelm"))) or ""
    )
    model = packed(make_family(tmp_path, "llama"))
    model.base_model.layers[0].mlp = torch.nn.Linear(3, 3)
    assert "its forward fails (RuntimeError" in (unfaithful(model) or "")


def test_an_unfaithful_model_ends_a_run_at_its_start(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    """For a model whose fault only its forward shows: attention in both directions within a window."""
    model = make_family(tmp_path / "m", "modernbert-decoder", pad_token_id=0)
    for path in tiny_model.glob("*token*"):
        shutil.copy(path, model)
    shutil.copy(tiny_model / "chat_template.jinja", model)
    config = write_run(tmp_path, model, "float32")
    prepared = prepare(load_config(config), config)
    with pytest.raises(UserError, match=r"^model: .*m cannot be trained: the learner does not compute a part of it"):
        asyncio.run(start_learner(prepared, [{"num_cpus": 0.5}]))
