"""A run with an environment and real engines: a model that has learned to end its replies plays episodes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sdft.actors.shared.sequences import TrainingSequence
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.records.batches import read_batch
from sdft.services.records.rows import read_jsonl
from tests.runs.run import finish, replayed, write_run

TAUGHT, PLAYED = 16, 2  # steps of the two stages
EPISODE = [
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "row-1 heard yes"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: a stage of SFT, then one of episodes, whose demonstrations are whole conversations."""
    folder = tmp_path_factory.mktemp("episodes")
    path = write_run(folder, tiny_model, "float32", optimizer={"lr": 5e-3, "warmup_steps": 2})
    prompts = [f"Say number {i}." for i in range(8)]
    for name, shown in (("replies", "yes"), ("episodes", EPISODE)):
        rows = [{"prompt": prompt, "demonstration": shown} for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"prompt": prompt, "answer": "any"} for prompt in prompts[:4]]
    (folder / "games.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    config = yaml.safe_load(path.read_text())
    data = config.pop("data") | {"max_teacher_prompt_tokens": 300}
    del config["training"]["steps"]
    environment = {"type": "tests.fakes.environments:Counting", "settings": {"turns": 2}, "max_tokens": 120}
    config["stages"] = [
        {"name": "replies", "data": data | {"train": "replies.jsonl"}, "steps": TAUGHT, "method": "sft"},
        {
            "name": "episodes",
            "data": data | {"train": "episodes.jsonl"},
            "steps": PLAYED,
            "method": {"type": "sdft", "skip_first": 0, "divergence": {"type": "forward", "top_k": 16}},
            "environment": environment,
            "optimizer": {"lr": 1e-4, "warmup_steps": 1},
            "sets": [{"name": "games", "file": "games.jsonl", "grader": "environment", "max_new_tokens": 12}],
        },
    ]
    path.write_text(yaml.safe_dump(config))
    finish(path, folder / "run")
    return folder / "run"


def test_sequences_have_the_turns_of_their_episodes(run: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    sequences = [s for step in range(TAUGHT + 1, TAUGHT + PLAYED + 1) for s in read_batch(run, step)]
    assert len(sequences) == 4 * PLAYED
    turns = Counter(len(s.spans) for s in sequences)
    assert turns[2] >= 6, turns  # the model ends nearly all of its replies
    for sequence in sequences:
        assert sampled(sequence).tolist() == sequence.loss_mask.tolist()
        assert np.isfinite(sequence.logprobs[sequence.loss_mask]).all()
        assert np.isnan(sequence.logprobs[~sequence.loss_mask]).all()
        assert sequence.teacher is not None
        assert len(sequence.teacher.ids) == sequence.loss_mask.sum()
        if len(sequence.spans) == 2:
            first, second = sequence.spans
            between = tokenizer.decode(sequence.token_ids[first.end : second.start])
            assert between.startswith("\n<|im_start|>user\nrow-")
            assert between.endswith("<|im_end|>\n<|im_start|>assistant\n")


def sampled(sequence: TrainingSequence) -> np.ndarray:
    """Return which tokens lie in a span."""
    inside = np.zeros(len(sequence), np.bool_)
    for span in sequence.spans:
        inside[span.start : span.end] = True
    return inside


def test_the_teacher_scores_each_token_as_transformers_does(run: Path, tiny_model: Path) -> None:
    """In one pass over all turns, behind a prompt with the whole demonstration; by the model at the stage's start."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(tiny_model)
    folder = run / "checkpoints" / f"step-{TAUGHT:06d}" / "student"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sequence = next(s for s in read_batch(run, TAUGHT + 1) if len(s.spans) == 2)
    assert sequence.teacher is not None
    start = sequence.spans[0].start
    prompt = tokenizer.decode(sequence.token_ids[:start])
    question = prompt.partition("user\n")[2].partition("<|im_end|>")[0]
    messages: list[Any] = [{"role": "user", "content": question}]
    shown = tokenizer.apply_chat_template([*messages, *EPISODE, *messages], tokenize=False, add_generation_prompt=True)
    teacher = tokenizer(shown, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*teacher, *sequence.token_ids[start:].tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(teacher) - 1 : -1]
    logprobs = torch.log_softmax(logits[:, : max(tokenizer.get_vocab().values()) + 1].float(), -1)
    wanted = logprobs.gather(1, ids[0, len(teacher) :, None])[:, 0].numpy()[sequence.loss_mask[start:]]
    assert np.abs(wanted - sequence.teacher.sampled).max() < 1e-4


def test_the_learner_alone_repeats_the_steps(run: Path) -> None:
    result = replayed(run, "--steps", f"{TAUGHT + 1}:{TAUGHT + PLAYED}")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert f"step {TAUGHT + 1}: the same" in result.stdout


def test_an_evaluation_set_counts_what_the_environment_passed(run: Path) -> None:
    games = [row for row in read_jsonl(run / "eval.jsonl") if row["task"] == "games"]
    last = games[-1]
    replies = [r for r in read_jsonl(run / "samples.jsonl") if r["task"] == "games" and r["step"] == last["step"]]
    assert len(replies) == 4
    assert sum(r["correct"] for r in replies) == last["value"] * 4 > 0
    assert max(r["turns"] for r in replies) == 2
    passed = next(r for r in replies if r["correct"])
    assert passed["text"].startswith("yes")
    assert "after 2]" in passed["text"]
