"""A user's own algorithm and `recall` in a real run: what is shown, what is trained, and the loss of two objectives."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft.actors.shared.sequences import TrainingSequence
from sdft.services.config.load import load_config
from sdft.services.planning.prepare import prepare
from sdft.services.records.batches import read_batch
from sdft.services.records.rows import read_jsonl
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS
from tests.runs.run import BIN, ENVIRONMENT, write_run

OWN = Path(__file__).parents[1] / "services/algorithms"  # the folder of siblings.py
GENERAL = ["Name a colour.", "Count to three.", "What is rain?", "Say good night."]


@pytest.fixture(scope="module")
def both(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stages of two steps: siblings that teach each other, then recall on four general prompts."""
    folder = tmp_path_factory.mktemp("algorithms")
    config = write_run(folder, tiny_model, "float32")
    (folder / "general.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in GENERAL))
    settings = yaml.safe_load(config.read_text())
    data, pairs = settings.pop("data"), {"max_new_tokens": 12, "generations": 2}
    siblings = {"type": "siblings:Siblings", "divergence": {"top_k": 16}, "skip_first": 0}
    recall = {"type": "recall", "prompts": "general.jsonl", "divergence": {"top_k": 16}}
    settings |= {
        "teacher": {"weights": "base"},
        "training": {"batch_size": 4},
        "evaluation": {},
        "stages": [
            {"name": "siblings", "data": data, "steps": 2, "method": siblings, "sampling": pairs},
            {"name": "recall", "data": data, "steps": 2, "method": recall, "sampling": {"max_new_tokens": 40}},
        ],
    }
    config.write_text(yaml.safe_dump(settings))
    command: list[str | Path] = [BIN / "sdft", "train", config, "--run-dir", folder / "run"]
    result = subprocess.run(command, cwd=OWN, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
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
