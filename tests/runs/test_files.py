"""Whole runs on model folders as they come: what is trained, and what is exported."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdft.actors.shared.model_files import weight_files
from sdft.services.cli.main import main
from sdft.services.records.batches import read_batch
from sdft.services.records.rows import read_jsonl
from tests.fakes.folders import as_it_comes, quantize_fp8
from tests.fakes.tiny import TOKENS
from tests.runs.run import finish, write_run

EMBEDDING = "model.embed_tokens.weight"
STEPS = 2


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in weight_files(model) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", ["as it comes", "quantized"])
def test_a_folder_is_trained_and_exported(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens beyond the tokenizer are in no rollout and in no teacher's top K, and their rows are not trained."""
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    before = tensors_of(tiny_model)
    if kind == "as it comes":
        as_it_comes(folder)
        before["lm_head.weight"] = before[EMBEDDING]
    else:
        quantize_fp8(folder)
    run_dir, out = tmp_path / "run", tmp_path / "out"
    finish(write_run(tmp_path, folder, "float32", STEPS), run_dir, "learner.optimizer.weight_decay=0")
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["mismatch_kl"] < 1e-6 for row in rows)
    for sequence in read_batch(run_dir, 1):
        assert sequence.teacher is not None
        assert max(sequence.token_ids.max(), sequence.teacher.ids.max()) < TOKENS
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    after = tensors_of(out)
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
    first = before[EMBEDDING].to(torch.float16 if kind == "as it comes" else torch.float32).float()
    assert torch.equal(after[EMBEDDING][TOKENS:], first[TOKENS:])
    assert not torch.equal(after[EMBEDDING][:TOKENS], first[:TOKENS])
