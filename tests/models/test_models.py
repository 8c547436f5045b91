"""One family of each kind: learner, engine and export agree with plain transformers. `make models` does them all."""

from pathlib import Path

import pytest

from tests.models.families import FAMILIES, make_family_model
from tests.models.matrix import faults, figures, refusal

PARTS = ("run",)  # the export is loaded by transformers here, and by an engine in `make models`
CHOSEN = ("Qwen3", "Gemma 2", "OLMoE", "LFM2", "Qwen3-Next", "Granite 4")


@pytest.mark.parametrize("name", CHOSEN)
def test_a_family_conforms(name: str, tiny_model: Path, tmp_path: Path) -> None:
    family, folder = FAMILIES[name], tmp_path / "model"
    make_family_model(family, folder, tiny_model)
    assert refusal(family, folder) is None
    assert faults(family, figures(family, folder, tmp_path, PARTS)) == []
