"""A multimodal model is trained as its text part: the same logits, and an export with every byte of the other parts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from sdft.actors.shared.model_files import INDEX, ORIGIN, SINGLE, weight_files
from sdft.learner.model.examine import examine
from sdft.learner.model.student import load_student
from sdft.learner.weights.text_part import Origin, WholeGone, join, split, why_not
from sdft.services.base.errors import UserError
from sdft.services.cli.commands.take import _export_student
from sdft.services.cli.main import main
from sdft.services.planning.derived import derived
from tests.fakes.folders import configure, quantize_fp8, shard, tensors_of
from tests.fakes.multimodal import MULTIMODAL, make_multimodal
from tests.runs.run import write_run


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_the_text_part_computes_what_the_whole_model_computes(model_type: str, tmp_path: Path) -> None:
    whole, text, out = make_multimodal(tmp_path / "whole", model_type), tmp_path / "text", tmp_path / "out"
    split(whole, text)
    assert examine(text, True).fault is None
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        ours, theirs = (
            auto.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
            for auto, folder in ((AutoModelForCausalLM, text), (AutoModelForImageTextToText, whole))
        )
    assert torch.equal(ours, theirs)
    join(text, Origin.of(text), out)
    assert (out / SINGLE).read_bytes() == (whole / SINGLE).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((whole / "config.json").read_text())
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_trained_text_part_takes_its_place_in_the_files_of_the_whole_model(tmp_path: Path) -> None:
    """In two files, and trained in another dtype than that of the vision model."""
    whole, text, out = make_multimodal(tmp_path / "whole", "gemma3"), tmp_path / "text", tmp_path / "out"
    before = tensors_of(whole)
    shard(whole)
    split(whole, text)
    for path in weight_files(text):
        save_file({name: (t + 1).bfloat16() for name, t in load_file(path).items()}, path, {"format": "pt"})
    join(text, Origin.of(text), out)
    after = tensors_of(out)
    assert after.keys() == before.keys()
    trained = {name for name in before if not torch.equal(before[name], after[name])}
    assert trained == {name for name in before if name.startswith("language_model.")}
    assert {after[name].dtype for name in trained} == {torch.bfloat16}
    assert json.loads((out / INDEX).read_text())["weight_map"].keys() == before.keys()
    model, loaded = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]


def test_a_text_part_without_its_whole_model_is_not_exported(tmp_path: Path) -> None:
    whole, text = make_multimodal(tmp_path / "whole", "gemma3"), tmp_path / "text"
    split(whole, text)
    assert (text / ORIGIN).exists()
    (whole / SINGLE).unlink()
    with pytest.raises(WholeGone, match=r"neither model\.safetensors"):
        join(text, Origin.of(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_text_part_is_refused(tmp_path: Path) -> None:
    whole = make_multimodal(tmp_path / "whole", "gemma3")
    configure(whole, model_type="nothing")
    assert "transformers does not support the model" in (why_not(whole, tmp_path / "text") or "")
    configure(whole, model_type="gemma3")
    save_file({"language_model.lm_head.weight": torch.ones(2)}, whole / SINGLE, {"format": "pt"})
    assert "no weight whose name begins with" in (why_not(whole, tmp_path / "other") or "")


def test_check_names_the_text_part_which_is_made_once(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unexamined: None,
) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    model = make_multimodal(tmp_path / "m", "gemma3", tiny_model)
    config = write_run(tmp_path, model, "float32")
    assert main(["check", str(config)]) == 0
    (text,) = (tmp_path / "cache" / "text").iterdir()
    line = f"{model} is multimodal; the run trains its text part, in {text}; `sdft export` puts the others back"
    assert line in capsys.readouterr().out
    monkeypatch.setattr("sdft.services.planning.derived.start", None)  # no process begins again
    assert main(["check", str(config)]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_stored_is_tied_only_if_it_equals_the_embedding(tied: bool, tmp_path: Path) -> None:
    """Folders of Mistral 3 do not say it at the top of config.json, and transformers' default there is true."""
    whole, text = make_multimodal(tmp_path / "whole", "mistral3"), tmp_path / "text"
    tensors = tensors_of(whole)
    head = tensors["language_model.model.embed_tokens.weight"].clone()
    save_file(tensors | {"language_model.lm_head.weight": head if tied else head + 1}, whole / SINGLE, {"format": "pt"})
    configure(whole, tie_word_embeddings=None)
    split(whole, text)
    assert json.loads((text / "config.json").read_text())["tie_word_embeddings"] == tied
    load_student(text, torch.float32)


def test_an_export_without_the_whole_model_says_what_brings_it_back(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    for place, mend in ((tmp_path / "whole", "put that folder back"), (tmp_path / "cache" / "w", "run `sdft check`")):
        whole, text = make_multimodal(place, "gemma3"), tmp_path / f"text-{place.name}"
        split(whole, text)
        shutil.rmtree(whole)
        (tmp_path / ".out.part-text").mkdir(exist_ok=True)  # of an export that was killed
        (tmp_path / ".out.part-text" / "x").touch()
        with pytest.raises(UserError, match=f"{place.name} does not exist; {mend}"):
            _export_student(text, tmp_path / ".out.part")


def test_a_copy_that_was_removed_comes_back_under_its_name(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text part is made of the copy without quantization, which is written anew."""
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    model = make_multimodal(tmp_path / "m", "gemma3", tiny_model)
    quantize_fp8(model)
    first = derived(model, "cpu", "float32", trains=True)
    assert [note.split(" ")[1] for note in first.notes] == ["weights", "is"]
    shutil.rmtree(tmp_path / "cache")
    assert derived(model, "cpu", "float32", trains=True) == first
    with pytest.raises(UserError, match="is multimodal and quantized, and cannot be evaluated here; name an exported"):
        derived(model, "cpu", "float32", trains=False)


def test_a_full_disk_is_no_fault_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    model = make_multimodal(tmp_path / "m", "gemma3")
    monkeypatch.setattr(
        "sdft.services.planning.derived.answer",
        lambda process: (process.wait(), {"fault": None, "disk": "x cannot be written (No space left on device)"})[1],
    )
    with pytest.raises(
        UserError, match=r"SDFT_CACHE: x cannot be written \(No space left on device\); free disk space"
    ):
        derived(model, "cpu", "float32", trains=True)
    assert not list(tmp_path.glob("cache/text/*"))


def test_a_fault_of_a_copy_names_the_folder_of_the_user(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    model = make_multimodal(tmp_path / "m", "gemma3", tiny_model)
    tensors = tensors_of(model)
    del tensors["language_model.model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model / SINGLE, {"format": "pt"})
    assert main(["check", str(write_run(tmp_path, model, "float32"))]) == 2
    error = capsys.readouterr().err
    assert "its files lack model.layers.1.mlp.down_proj.weight" in error
    assert f"is a copy: {model} is multimodal" in error
