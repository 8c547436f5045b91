"""Models that the engines cannot serve are refused before any process starts."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sdft.services.cli.main import main
from sdft.services.planning.examined import Examined
from sdft.services.planning.limits import engine_limit
from tests.runs.run import write_run


@pytest.mark.parametrize(
    ("config", "device", "dtype", "words"),
    [
        (
            {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}},
            "cpu",
            "float32",
            "delta nets on a CPU in bfloat16 only",
        ),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe"]}, "cpu", "float32", "no kernels for its"),
        ({"model_type": "qwen3_next"}, "cpu", "float32", "delta nets on a CPU in bfloat16 only; set dtype: bfloat16"),
    ],
)
def test_a_limit_of_the_engines_is_a_reason_with_its_mend(
    config: dict[str, Any], device: str, dtype: str, words: str
) -> None:
    assert words in (engine_limit(config, device, dtype) or "")


@pytest.mark.parametrize(
    ("config", "device", "dtype"),
    [
        ({"model_type": "qwen3_5_text"}, "cuda", "float32"),
        ({"model_type": "qwen3_5_moe_text"}, "cpu", "bfloat16"),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "attention", "mlp"]}, "cpu", "float32"),
        ({"model_type": "qwen3_next"}, "cpu", "bfloat16"),
        ({"model_type": "olmoe", "num_experts": 64}, "cpu", "float32"),
        ({"model_type": "gpt_oss"}, "cpu", "float32"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "cpu", "float32"),
        ({}, "cpu", "float32"),
    ],
)
def test_other_models_have_no_limit(config: dict[str, Any], device: str, dtype: str) -> None:
    assert engine_limit(config, device, dtype) is None


@pytest.mark.usefixtures("unexamined")
def test_check_refuses_a_model_that_engines_cannot_serve(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_next"}))
    assert main(["check", str(write_run(tmp_path, model, "float32"))]) == 2
    assert "cannot be trained here: vLLM computes its delta nets on a CPU in bfloat16 only" in capsys.readouterr().err


def test_ranks_of_zero_3_need_layers_that_compute_a_pack_at_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each sequence is a collective call then, and ranks have other numbers of sequences: they would wait for ever."""
    monkeypatch.setattr("sdft.services.planning.prepare.examined", lambda *_: nullcontext(Examined(divides=True)))
    config = str(write_run(tmp_path, tiny_model, "float32"))
    two = ["--set", "learner.ranks=2", "--set"]
    assert main(["check", config, *two, "learner.zero_stage=2"]) == 0
    assert main(["check", config, *two, "learner.zero_stage=3"]) == 2
    assert "cannot do at that stage; set learner.zero_stage: 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (
            Examined(divides=True),
            "carry something from each token to the next, or compute sequences alone; set it to 1",
        ),
        (Examined(shared_by=(1, 2, 6)), "can be divided over 1, 2 or 6 ranks; set it to 2"),
        (Examined(), "can be divided over 1 rank; set it to 1"),
    ],
)
def test_ranks_that_cannot_divide_the_tokens_are_refused(
    found: Examined,
    why: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sdft.services.planning.prepare.examined", lambda *_: nullcontext(found))
    config = str(write_run(tmp_path, tiny_model, "float32"))
    four = ["--set", "learner.ranks=4", "--set", "training.batch_size=4"]
    assert main(["check", config, *four, "--set", "learner.sequence_parallel=4"]) == 2
    assert why in capsys.readouterr().err
