"""Mixtures of experts are refused before any process starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.cli.main import main
from sdft.services.planning.shape import refuse_experts
from tests.runs.run import write_run


def folder(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts": 4},
        {"num_local_experts": 8},
        {"n_routed_experts": 64},
        {"moe_num_experts": [64, 64]},
        {"model_type": "with images", "text_config": {"num_local_experts": 16}},
    ],
)
def test_a_mixture_of_experts_is_refused_by_the_key_that_tells(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: \w+ is \S+.*: .* mixture of experts, .*choose a model without"):
        refuse_experts(folder(tmp_path, config))


@pytest.mark.parametrize("config", [{}, {"num_experts": 1}, {"num_local_experts": 0}, {"n_routed_experts": None}])
def test_a_model_without_experts_is_accepted(config: dict[str, Any], tmp_path: Path) -> None:
    refuse_experts(folder(tmp_path, config | {"text_config": None}))


def test_check_refuses_a_mixture_of_experts(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny_model, model)
    folder(model, json.loads((model / "config.json").read_text()) | {"num_experts": 4})
    assert main(["check", str(write_run(tmp_path, model, "bfloat16"))]) == 2
    assert f"{model / 'config.json'}: num_experts is 4: this model is a mixture of experts" in capsys.readouterr().err
