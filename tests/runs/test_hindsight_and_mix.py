"""Hindsight and mix in one real strict run of four stages: prompts, scores and losses beside transformers, and resume.

hindsight ─► mix with demonstrations ─► mix with the teacher's completions ─► mix with prefixes
"""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sdft.actors.shared.sequences import TrainingSequence
from sdft.services.config.load import load_config
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import Prepared
from sdft.services.records.batches import read_batch
from sdft.services.records.rows import read_jsonl
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS
from tests.runs.run import BIN, ENVIRONMENT, metrics, replayed, write_run

pytestmark = pytest.mark.whole

EACH = 2  # steps of a stage
HINDSIGHT, DEMONSTRATIONS, TEACHERS, PREFIXES = (1 + EACH * i for i in range(4))  # first steps of the stages
SHARE, PREFIX = 0.5, 5


def conversation(i: int) -> list[dict[str, str]]:
    texts = (f"Say number {i}.", "two", f"No, number {i}.", "one", "Right.")
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configuration and the run directory."""
    folder = tmp_path_factory.mktemp("mixed")
    config = write_run(folder, tiny_model, "float32")
    rows = [{"messages": conversation(i)} for i in range(2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = yaml.safe_load(config.read_text())
    data = settings.pop("data") | {"max_teacher_prompt_tokens": 250}
    common = {"divergence": {"top_k": 16}, "skip_first": 0}
    mix = {"type": "mix", "share": SHARE} | common
    log = data | {"train": "log.jsonl", "template": "feedback"}
    settings |= {
        "teacher": {"weights": "base"},
        "sampling": {"max_new_tokens": 40},
        "training": {"batch_size": 4},
        "evaluation": {},
        "checkpoint": {"every": EACH, "keep": 100},
        "stages": [
            {"name": "hindsight", "data": log, "steps": EACH, "method": {"type": "hindsight"} | common},
            {"name": "demonstrations", "data": data, "steps": EACH, "method": mix},
            {"name": "teachers", "data": data, "steps": EACH, "method": mix | {"expert": "teacher"}},
            {
                "name": "prefixes",
                "data": data,
                "steps": EACH,
                "method": mix | {"expert": {"type": "prefix", "tokens": PREFIX}},
            },
        ],
    }
    config.write_text(yaml.safe_dump(settings))
    trained(config, folder / "run")
    return config, folder / "run"


def trained(config: Path, run_dir: Path, *more: str | Path) -> None:
    command: list[str | Path] = [BIN / "sdft", "train", config, "--run-dir", run_dir, *more]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.fixture(scope="module")
def prepared(run: tuple[Path, Path]) -> Prepared:
    return prepare(load_config(run[0]), run[0])


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> torch.nn.Module:
    """The teacher: the first model."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def taught(base: torch.nn.Module, prompt: list[int], sequence: TrainingSequence) -> None:
    """Check that the teacher's scores are the first model's behind this prompt."""
    (completion,) = sequence.completions
    rows = logprobs(base, np.array(prompt, np.int32), completion, TOKENS)
    own = rows.gather(1, torch.tensor(completion).long()[:, None])[:, 0]
    assert sequence.teacher is not None
    np.testing.assert_allclose(sequence.teacher.sampled, own, atol=1e-4)


def expected_loss(run_dir: Path, step: int) -> float:
    """Return the loss of a batch by transformers: a mean over its sequences, each a mean over its tokens."""
    student = AutoModelForCausalLM.from_pretrained(
        run_dir / "checkpoints" / f"step-{step - 1:06d}" / "student", dtype=torch.float32
    )
    losses = []
    for sequence in read_batch(run_dir, step):
        (completion,) = sequence.completions
        log_p = logprobs(student, sequence.prompt_ids, completion, TOKENS)
        if sequence.teacher is None:
            losses.append(-log_p.gather(1, torch.tensor(completion).long()[:, None]).mean())
            continue
        log_q = torch.tensor(sequence.teacher.logprobs)
        p, q = log_p.gather(1, torch.tensor(sequence.teacher.ids).long()).exp(), log_q.exp()
        p_tail, q_tail = 1 - p.sum(-1), 1 - q.sum(-1)
        losses.append(((q * (q / p).log()).sum(-1) + q_tail * (q_tail / p_tail).log()).mean())
    return float(torch.stack(losses).mean())


def of_stage(run_dir: Path, first: int) -> list[TrainingSequence]:
    return [s for step in range(first, first + EACH) for s in read_batch(run_dir, step)]


def test_the_teacher_of_hindsight_sees_the_reply_and_what_was_said_next(
    run: tuple[Path, Path], tiny_model: Path, base: torch.nn.Module
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    for sequence in of_stage(run[1], HINDSIGHT):
        i, reply = divmod(sequence.sample.record, 2)
        turns = conversation(i)[: 2 * reply + 3]
        *history, said, following = turns
        question = history[-1]["content"]
        shown = (
            f"{question}\n\nThis is feedback on an earlier response to the question:\nThe response was:\n"
            f"{said['content']}\n\nThis was said about it:\n{following['content']}\n\n"
            "Now answer with a response of your own that needs no such feedback."
        )
        behind: Any = [*history[:-1], {"role": "user", "content": shown}]
        text = tokenizer.apply_chat_template(behind, tokenize=False, add_generation_prompt=True)
        own = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(sequence.prompt_ids) == own
        taught(base, tokenizer(text, add_special_tokens=False)["input_ids"], sequence)
        assert np.isfinite(sequence.logprobs[sequence.loss_mask]).all()


@pytest.mark.parametrize("step", [DEMONSTRATIONS, TEACHERS, PREFIXES])
def test_losses_are_those_of_transformers(run: tuple[Path, Path], step: int) -> None:
    row = read_jsonl(run[1] / "metrics.jsonl")[step - 1]
    assert row["loss"] == pytest.approx(expected_loss(run[1], step), rel=1e-3)


def test_the_metrics_name_the_losses(run: tuple[Path, Path]) -> None:
    rows = read_jsonl(run[1] / "metrics.jsonl")
    directions = [rows[step - 1]["direction"] for step in (HINDSIGHT, DEMONSTRATIONS, TEACHERS, PREFIXES)]
    assert directions == ["forward", "forward and nll", "forward", "forward"]


@pytest.mark.parametrize("first", [DEMONSTRATIONS, TEACHERS, PREFIXES])
def test_the_seed_of_a_sample_says_whether_it_has_the_experts_tokens(
    run: tuple[Path, Path], prepared: Prepared, base: torch.nn.Module, first: int
) -> None:
    stage, kinds = prepared.at(first), set()
    for sequence in of_stage(run[1], first):
        pair, mixed = stage.prompts[sequence.sample.record], random.Random(sequence.seed).random() < SHARE
        kinds.add(mixed)
        assert pair.teacher_ids is not None
        prefix = list[int]()
        if mixed and first == PREFIXES:
            assert pair.demonstration_ids is not None
            prefix = pair.demonstration_ids[:PREFIX].tolist()
        assert sequence.prompt_ids.tolist() == [*pair.student_ids, *prefix]
        if mixed and first == DEMONSTRATIONS:
            assert sequence.teacher is None
            np.testing.assert_array_equal(sequence.completions[0], pair.demonstration_ids)
        else:
            taught(base, [*pair.teacher_ids, *prefix], sequence)
        by_student = not (mixed and first in (DEMONSTRATIONS, TEACHERS))
        assert np.isfinite(sequence.logprobs[sequence.loss_mask]).all() == by_student
        assert sequence.loss_mask[len(sequence.prompt_ids) :].all()
    assert kinds == {True, False}


def test_a_resumed_run_has_the_same_bits(run: tuple[Path, Path]) -> None:
    config, run_dir = run
    from_step = DEMONSTRATIONS - 1
    trained(config, run_dir.with_name("other"), "--resume", run_dir / "checkpoints" / f"step-{from_step:06d}")
    assert metrics(run_dir.with_name("other"))[-3 * EACH :] == metrics(run_dir)[from_step:]


def test_the_learner_alone_repeats_the_steps(run: tuple[Path, Path]) -> None:
    result = replayed(run[1], "--steps", f"{DEMONSTRATIONS}:{PREFIXES}")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert f"step {PREFIXES}: the same" in result.stdout
