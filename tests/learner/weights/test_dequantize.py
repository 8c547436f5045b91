"""Quantized folders are trained from a copy whose weights are those that transformers computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Mxfp4Config

from sdft.actors.shared.model_files import INDEX, SINGLE
from sdft.learner.model.examine import examine
from sdft.learner.weights.dequantize import dequantize, scaled, why_not
from sdft.services.cli.main import main
from tests.fakes.families import make_family
from tests.fakes.folders import change, configure, quantize_fp8, shard, tensors_of
from tests.runs.run import write_run

DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "m")


def assert_as_loaded(copy: Path, quantized: Path, **settings: Any) -> None:
    """Check that transformers loads the same weights from the copy as it dequantizes from the folder."""
    loaded, ours = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **how).state_dict()
        for folder, how in ((quantized, settings), (copy, {}))
    )
    assert loaded.keys() >= ours.keys()  # with compressed-tensors, transformers keeps the scales too
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)


@pytest.mark.parametrize("block", [128, 64])
def test_fp8_in_blocks(block: int, model: Path, tmp_path: Path) -> None:
    before = tensors_of(model)
    meant = quantize_fp8(model, block)
    shard(model)  # a weight and its scale may lie in two files
    dequantize(model, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], meant[name]) for name in meant)
    assert set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]) == before.keys()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_as_loaded(tmp_path / "out", model)
    assert examine(tmp_path / "out", True).fault is None


def test_blocks_at_the_edges_are_smaller() -> None:
    numbers, scale = torch.ones(5, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    rows = [[1.0, 1, 2], [1, 1, 2], [3, 3, 4], [3, 3, 4], [5, 5, 6]]
    assert scaled(numbers, scale, [2, 2]).tolist() == rows
    assert scaled(numbers, torch.tensor(130, dtype=torch.uint8), None).eq(8).all()
    with pytest.raises(ValueError, match=r"shape \[5, 3\] has scales of the shape \[3, 2\], and .* needs \[2, 1\]"):
        scaled(numbers, scale, [4, 4])


def test_fp8_without_its_scale_is_refused(model: Path, tmp_path: Path) -> None:
    quantize_fp8(model)
    change(model, lambda tensors: tensors.pop(f"{DOWN_PROJ}_scale_inv"))
    assert f"{DOWN_PROJ} is float8_e4m3fn, and only FP8 with {DOWN_PROJ}_scale_inv" in (
        why_not(model, tmp_path / "out") or ""
    )


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """Random bytes in place of quantized experts: every byte is two numbers."""
    model = make_family(tmp_path / "m", "gpt_oss", num_local_experts=2, num_experts_per_tok=1, pad_token_id=0)
    tensors = load_file(model / SINGLE)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, out, width // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 130, (experts, out, width // 32), dtype=torch.uint8)
    save_file(tensors, model / SINGLE, {"format": "pt"})
    configure(model, quantization_config={"quant_method": "mxfp4"}, dtype="bfloat16")
    dequantize(model, tmp_path / "out")
    assert any(name.endswith("gate_up_proj") for name in tensors_of(tmp_path / "out"))
    assert_as_loaded(tmp_path / "out", model, quantization_config=Mxfp4Config(dequantize=True))


GROUP: dict[str, Any] = {"targets": ["Linear"], "output_activations": None}
WEIGHTS = {"dynamic": False, "symmetric": True, "observer": "minmax"}
SCHEMES: dict[str, dict[str, Any]] = {
    "float-quantized": {
        "weights": WEIGHTS | {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
    },
    "pack-quantized": {
        "weights": WEIGHTS | {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        "input_activations": None,
    },
}


@pytest.mark.parametrize("form", SCHEMES)
def test_compressed_tensors(form: str, model: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]
    from compressed_tensors.quantization import QuantizationConfig  # type: ignore[import-untyped]

    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": GROUP | SCHEMES[form] | {"format": form}},
    }
    (scheme,) = QuantizationConfig.model_validate(settings).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(form)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / SINGLE).items()}
    names = set(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        groups = weight.unflatten(1, (-1, 32)) if form == "pack-quantized" else weight[:, None]
        scale = groups.abs().amax(-1) / (7 if form == "pack-quantized" else 448)
        layer = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor.contiguous() for part, tensor in layer.items()}
    save_file(tensors, model / SINGLE, {"format": "pt"})
    configure(model, quantization_config=settings, dtype="bfloat16")
    dequantize(model, tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == names
    assert_as_loaded(tmp_path / "out", model, quantization_config=CompressedTensorsConfig(dequantize=True))


def test_check_trains_a_quantized_model_from_a_copy_that_is_made_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unexamined: None
) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    quantize_fp8(model)
    config = write_run(tmp_path, model, "float32")
    assert main(["check", str(config)]) == 0
    (copy,) = (tmp_path / "cache" / "dequantized").iterdir()
    line = f"the weights in {model} are quantized; the run begins with their dequantized copy in {copy}"
    assert line in capsys.readouterr().out
    monkeypatch.setattr("sdft.services.planning.derived.start", None)  # no process begins again
    assert main(["check", str(config)]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quantized with GPTQ (quantization_config in config.json), and only fp8, ",
        ),
        ({"quant_method": "awq", "bits": 4}, "quantized with AWQ"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "quantized with bitsandbytes"),
        ({"quant_method": "hqq"}, "quantized with hqq"),
        ({"quant_method": "fp8", "weight_block_size": [7, 7]}, "cannot be dequantized: a tensor of the shape"),
        ({"quant_method": "fp8", "weight_block_size": "x"}, "its files do not fit the quantization_config"),
        ({"quant_method": "compressed-tensors"}, "config_groups of quantization_config in config.json is wrong (Field"),
    ],
)
def test_what_cannot_be_dequantized_is_refused_by_name(
    settings: dict[str, object],
    words: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    quantize_fp8(model)
    configure(model, quantization_config=settings)
    assert main(["check", str(write_run(tmp_path, model, "float32"))]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "name the model that it was made from" in error
    assert not list(tmp_path.glob("cache/dequantized/*"))


def test_a_quantized_model_that_the_learner_could_not_train_is_not_copied(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    quantize_fp8(model)
    configure(model, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert main(["check", str(write_run(tmp_path, model, "float32"))]) == 2
    assert "rope_type is dynamic" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
