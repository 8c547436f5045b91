"""Algorithms and episodes in one real run of four stages: what is shown, what is trained, and the losses.

siblings (a user's own algorithm) ─► recall ─► sft, so that the model ends its replies ─► sdft with an environment
"""

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft.actors.shared.sequences import TrainingSequence
from sdft.services.config.load import load_config
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.planning.prepare import prepare
from sdft.services.records.batches import read_batch
from sdft.services.records.rows import read_jsonl
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS
from tests.papers.documents import ROOT
from tests.runs.run import BIN, ENVIRONMENT, replayed, write_run

OWN = Path(__file__).parents[1] / "services/algorithms"  # the folder of siblings.py
BEFORE, TAUGHT, PLAYED = 4, 16, 2  # steps of the first two stages, of SFT, and of the episodes
FIRST = BEFORE + TAUGHT + 1  # step with episodes
EPISODE = [
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "row-1 heard yes"},
    {"role": "assistant", "content": "yes"},
]
GENERAL = ["Name a colour.", "Count to three.", "What is rain?", "Say good night."]


@pytest.fixture(scope="module")
def both(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Siblings that teach each other, recall on four general prompts, SFT, and episodes."""
    folder = tmp_path_factory.mktemp("algorithms")
    config = write_run(folder, tiny_model, "float32")
    (folder / "general.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in GENERAL))
    settings = yaml.safe_load(config.read_text())
    data, pairs = settings.pop("data"), {"max_new_tokens": 12, "generations": 2}
    siblings = {"type": "siblings:Siblings", "divergence": {"top_k": 16}, "skip_first": 0}
    recall = {"type": "recall", "prompts": "general.jsonl", "divergence": {"top_k": 16}}
    prompts = [f"Say number {i}." for i in range(8)]
    for name, shown in (("replies", ["yes", EPISODE]), ("episodes", [EPISODE])):
        rows = [{"prompt": prompt, "demonstration": shown[i % len(shown)]} for i, prompt in enumerate(prompts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "games.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "?"}) + "\n" for p in prompts[:4]))
    environment = {"type": "tests.fakes.environments:Counting", "settings": {"turns": 2}, "max_tokens": 120}
    settings |= {
        "teacher": {"weights": "base"},
        "training": {"batch_size": 4},
        "evaluation": {},
        "checkpoint": {"every": 2, "keep": 100},
        "stages": [
            {"name": "siblings", "data": data, "steps": 2, "method": siblings, "sampling": pairs},
            {"name": "recall", "data": data, "steps": 2, "method": recall, "sampling": {"max_new_tokens": 40}},
            {
                "name": "replies",
                "data": data | {"train": "replies.jsonl"},
                "steps": TAUGHT,
                "method": "sft",
                "sampling": {"max_new_tokens": 60},
                "optimizer": {"lr": 5e-3, "warmup_steps": 2},
            },
            {
                "name": "episodes",
                "data": data | {"train": "episodes.jsonl", "max_teacher_prompt_tokens": 300},
                "steps": PLAYED,
                "method": {"type": "sdft", "skip_first": 0, "divergence": {"support": "union", "top_k": 8}},
                "environment": environment,
                "optimizer": {"lr": 1e-4, "warmup_steps": 1},
                "sets": [{"name": "games", "file": "games.jsonl", "grader": "environment", "max_new_tokens": 12}],
            },
        ],
    }
    config.write_text(yaml.safe_dump(settings))
    command: list[str | Path] = [BIN / "sdft", "train", config, "--run-dir", folder / "run"]
    environ = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}"}  # finds the environment
    result = subprocess.run(command, cwd=OWN, env=environ, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "sft on the demonstrations, forward divergence to the base model on general prompts, base teacher" in (
        result.stdout
    )
    return config, folder / "run"


def taught(base: torch.nn.Module, prompt: list[int], sequence: TrainingSequence) -> None:
    """Check that the first model, behind this prompt, gave the teacher's scores of a sequence."""
    (completion,) = sequence.completions
    rows = logprobs(base, np.array(prompt, np.int32), completion, TOKENS)
    own = rows.gather(1, torch.tensor(completion).long()[:, None])[:, 0]
    assert sequence.teacher is not None
    np.testing.assert_allclose(sequence.teacher.sampled, own, atol=1e-4)


def test_an_own_algorithm_shows_the_teacher_what_the_run_made(
    both: tuple[Path, Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = both
    monkeypatch.chdir(OWN)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    contexts = prepare(load_config(config), config).stages[0].contexts
    sequences = read_batch(run_dir, 1)
    by_sample = {s.sample: s for s in sequences}
    assert Counter(s.sample.record for s in sequences) == dict.fromkeys({s.sample.record for s in sequences}, 2)
    for sequence in sequences:
        sample = sequence.sample
        (sibling,) = (s for key, s in by_sample.items() if key.record == sample.record and key != sample)
        context = contexts(sample.record)
        taught(base, context.teacher(demonstration=context.text(sibling.completions[0])).tolist(), sequence)


def test_recall_learns_demonstrations_and_keeps_the_first_model(both: tuple[Path, Path], tiny_model: Path) -> None:
    """The loss of a batch is the mean over its sequences: log-likelihood of some, the divergence of the others."""
    _, run_dir = both
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(
        run_dir / "checkpoints" / "step-000002" / "student", dtype=torch.float32
    )
    sequences, losses = read_batch(run_dir, 3), []
    for sequence in sequences:
        (completion,) = sequence.completions
        log_p = logprobs(student, sequence.prompt_ids, completion, TOKENS)
        if sequence.teacher is None:
            losses.append(-log_p.gather(1, torch.tensor(completion).long()[:, None]).mean())
            continue
        taught(base, sequence.prompt_ids.tolist(), sequence)
        log_q = torch.tensor(sequence.teacher.logprobs)
        p, q = log_p.gather(1, torch.tensor(sequence.teacher.ids).long()).exp(), log_q.exp()
        p_tail, q_tail = 1 - p.sum(-1), 1 - q.sum(-1)
        losses.append(((q * (q / p).log()).sum(-1) + q_tail * (q_tail / p_tail).log()).mean())
    row = read_jsonl(run_dir / "metrics.jsonl")[2]
    assert {s.teacher is None for s in sequences} == {True, False}
    assert row["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert row["direction"] == "nll and forward"
    text = AutoTokenizer.from_pretrained(tiny_model)
    for sequence in sequences:
        prompt, reply = (text.decode(ids) for ids in (sequence.prompt_ids, sequence.completions[0]))
        assert (f"The number is {sequence.sample.record}." in reply) == (sequence.teacher is None)
        assert any(line in prompt for line in GENERAL) == (sequence.teacher is not None)


def test_sft_trains_the_assistants_tokens_of_several_turns(both: tuple[Path, Path], tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    sequences = [s for step in (BEFORE + 1, BEFORE + 2) for s in read_batch(both[1], step)]
    assert len({s.sample.record for s in sequences}) == 8
    for sequence in sequences:
        trained = tokenizer.decode(sequence.token_ids[sequence.loss_mask])
        assert trained == "yes<|im_end|>" * (1 + sequence.sample.record % 2)
        assert tokenizer.decode(sequence.token_ids).endswith("assistant\nyes<|im_end|>")


def test_sequences_have_the_turns_of_their_episodes(both: tuple[Path, Path], tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    sequences = [s for step in range(FIRST, FIRST + PLAYED) for s in read_batch(both[1], step)]
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


def test_the_teacher_scores_each_token_as_transformers_does(both: tuple[Path, Path], tiny_model: Path) -> None:
    """In one pass over all turns, behind a prompt with the whole demonstration."""
    tokenizer = load_tokenizer(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)  # teacher.weights is base
    sequence = next(s for s in read_batch(both[1], FIRST) if len(s.spans) == 2)
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


def test_the_students_most_likely_tokens_of_each_turn_are_scored(both: tuple[Path, Path], tiny_model: Path) -> None:
    """Those of support union: first the student's, here with the weights before the first step with episodes."""
    before = both[1] / "checkpoints" / f"step-{FIRST - 1:06d}" / "student"
    student = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)
    sequence = next(s for s in read_batch(both[1], FIRST) if len(s.spans) == 2)
    assert sequence.teacher is not None
    start = sequence.spans[0].start
    rows = logprobs(student, sequence.token_ids[:start], sequence.token_ids[start:], TOKENS)
    own = rows[torch.tensor(sequence.loss_mask[start:])]
    ids = torch.tensor(sequence.teacher.ids).long()
    assert ids.shape == (len(own), 16)
    assert all(len(set(row)) == 16 for row in ids.tolist())
    np.testing.assert_allclose(own.gather(1, ids[:, :8]), own.topk(8, 1).values, atol=1e-4)


@pytest.mark.whole
def test_the_learner_alone_repeats_the_steps(both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OWN)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    result = replayed(both[1], "--steps", f"{FIRST}:{FIRST + PLAYED - 1}")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert f"step {FIRST}: the same" in result.stdout


def test_an_evaluation_set_counts_what_the_environment_passed(both: tuple[Path, Path]) -> None:
    games = [row for row in read_jsonl(both[1] / "eval.jsonl") if row["task"] == "games"]
    last = games[-1]
    replies = [r for r in read_jsonl(both[1] / "samples.jsonl") if r["task"] == "games" and r["step"] == last["step"]]
    assert len(replies) == 4
    assert sum(r["correct"] for r in replies) == last["value"] * 4 > 0
    assert max(r["turns"] for r in replies) == 2
    passed = next(r for r in replies if r["correct"])
    assert passed["text"].startswith("yes")
    assert "after 2]" in passed["text"]
