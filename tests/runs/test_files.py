"""Whole runs on model folders as they come: what is trained, and what is exported."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sdft.actors.shared.sequences import TrainingSequence
from sdft.services.cli.main import main
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.records.batches import read_batch
from sdft.services.records.rows import read_jsonl
from tests.fakes.folders import as_it_comes, quantize_fp8, tensors_of
from tests.fakes.multimodal import make_multimodal
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS
from tests.runs.run import finish, write_run

EMBEDDING = {"as it comes": "model.embed_tokens.weight", "multimodal": "language_model.model.embed_tokens.weight"}
STEPS = 2
PLAIN = "learner.optimizer.weight_decay=0"
LIVE = "teacher={weights: live}"  # one engine samples and scores


@pytest.mark.parametrize("kind", ["as it comes", pytest.param("multimodal", marks=pytest.mark.whole)])
def test_a_folder_is_trained_and_exported(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens beyond the tokenizer are in no rollout and in no teacher's top K, and their rows are not trained.

    The multimodal model is quantized, too. Its vision model is in the export as it was, without quantization.
    """
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    if kind == "as it comes":
        folder = shutil.copytree(tiny_model, tmp_path / "m")
        before = tensors_of(folder)
        before["lm_head.weight"] = before[EMBEDDING[kind]]
        as_it_comes(folder)
    else:
        folder = make_multimodal(tmp_path / "m", "gemma3", tiny_model)
        before = tensors_of(folder)
        before |= quantize_fp8(folder)
    run_dir, out = tmp_path / "run", tmp_path / "out"
    external = f"teacher={{weights: external, model: {folder}}}"
    finish(write_run(tmp_path, folder, "float32", STEPS), run_dir, PLAIN, external if kind == "as it comes" else LIVE)
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["mismatch_kl"] < 1e-6 for row in rows)
    for sequence in read_batch(run_dir, 1):
        assert sequence.teacher is not None
        assert max(sequence.token_ids.max(), sequence.teacher.ids.max()) < TOKENS
    if kind == "as it comes":
        keeps_its_weights(folder, read_batch(run_dir, STEPS)[0])
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    after = tensors_of(out)
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
    embedding = EMBEDDING[kind]
    first = before[embedding].to(torch.float16 if kind == "as it comes" else torch.float32).float()
    assert torch.equal(after[embedding][TOKENS:], first[TOKENS:])
    assert not torch.equal(after[embedding][:TOKENS], first[:TOKENS])
    others = [name for name in before if name.startswith(("vision_tower.", "multi_modal_projector."))]
    assert bool(others) == (kind == "multimodal")
    assert all(torch.equal(after[name], before[name]) for name in others)


def keeps_its_weights(folder: Path, sequence: TrainingSequence) -> None:
    """An external teacher scores the last step with the weights of its folder."""
    assert sequence.teacher is not None
    tokenizer, (completion,) = load_tokenizer(folder), sequence.completions
    number = tokenizer.decode(sequence.prompt_ids).partition("Say number ")[2][0]
    question = {"role": "user", "content": f"Say number {number}."}
    shown = [question, {"role": "assistant", "content": f"The number is {number}."}, question]
    prompt = tokenizer(
        str(tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)), add_special_tokens=False
    )["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = logprobs(model, np.asarray(prompt, np.int32), completion, TOKENS)
    wanted = own.gather(1, torch.tensor(completion).long()[:, None])[-len(sequence.teacher.sampled) :, 0]
    np.testing.assert_allclose(sequence.teacher.sampled, wanted, atol=1e-4)
