"""Supports and options of the divergence in one real run of a stage each: tokens, scores, losses, and the replay."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sdft.actors.shared.sequences import TrainingSequence
from sdft.services.config.load import load_config
from sdft.services.planning.prepare import prepare
from sdft.services.records.batches import read_batch
from sdft.services.records.rows import read_jsonl
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS
from tests.runs.run import finish, metrics, replayed, write_run

pytestmark = pytest.mark.whole

K, STEPS = 8, 2  # tokens of a support, steps of a stage
ENTROPY, LENGTH, CLIP = 0.1, 5, 0.02
SUPPORTS = ("teacher", "student", "union", "full")
WIDTHS = {"teacher": K, "student": K, "union": 2 * K, "full": TOKENS}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("supports")
    config = write_run(folder, tiny_model, "float32")
    settings = yaml.safe_load(config.read_text())
    data = settings.pop("data")

    def stage(name: str, **method: object) -> dict[str, object]:
        support = name if name in SUPPORTS else "teacher"
        divergence = {"type": "reverse", "support": support} | ({} if support == "full" else {"top_k": K})
        of_options = {"clip": CLIP} if "entropy" in method else {}
        method |= {"type": "sdft", "skip_first": 0, "divergence": divergence | of_options}
        return {"name": name, "data": data, "steps": STEPS, "method": method}

    options = stage("options", entropy=ENTROPY, length=LENGTH)
    settings |= {
        "teacher": {"weights": "base"},
        "training": {"batch_size": 4},
        "evaluation": {},
        "checkpoint": {"every": STEPS, "keep": 100},
        "stages": [*map(stage, SUPPORTS), options],
    }
    config.write_text(yaml.safe_dump(settings))
    finish(config, folder / "run")
    return config, folder / "run"


def first_step(stage: int) -> int:
    return STEPS * stage + 1


def student_of(run_dir: Path, tiny_model: Path, stage: int) -> torch.nn.Module:
    """Return the student at the start of a stage."""
    folder = run_dir / "checkpoints" / f"step-{STEPS * stage:06d}" / "student" if stage else tiny_model
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) of each row over the tokens `ids` and one bucket of all others, from whole distributions."""
    p, q = (log.gather(1, ids).exp() for log in (log_p, log_q))
    of_ids = (p * (p / q).log()).sum(1)
    if ids.shape[1] == log_p.shape[1]:
        return of_ids
    p_tail, q_tail = 1 - p.sum(1), 1 - q.sum(1)
    return of_ids + p_tail * (p_tail / q_tail).log()


def distributions(
    run: tuple[Path, Path], tiny_model: Path, stage: int
) -> list[tuple[TrainingSequence, torch.Tensor, torch.Tensor]]:
    """Return the sequences of a stage's first step, and the student's and the teacher's log-probs [T, V] of each."""
    config, run_dir = run
    student, teacher = student_of(run_dir, tiny_model, stage), student_of(run_dir, tiny_model, 0)
    prompts = prepare(load_config(config), config).stages[stage].prompts
    found = []
    for sequence in read_batch(run_dir, first_step(stage)):
        (completion,), pair = sequence.completions, prompts[sequence.sample.record]
        assert pair.teacher_ids is not None
        own = logprobs(student, pair.student_ids, completion, TOKENS)
        found.append((sequence, own, logprobs(teacher, pair.teacher_ids, completion, TOKENS)))
    return found


@pytest.mark.parametrize("stage", range(len(SUPPORTS)))
def test_the_scores_are_of_the_supports_tokens_and_the_loss_is_the_formula(
    run: tuple[Path, Path], tiny_model: Path, stage: int
) -> None:
    of, losses = SUPPORTS[stage], []
    for sequence, log_p, log_q in distributions(run, tiny_model, stage):
        assert sequence.teacher is not None
        ids = torch.tensor(sequence.teacher.ids).long()
        assert ids.shape == (len(log_p), WIDTHS[of])
        np.testing.assert_allclose(sequence.teacher.logprobs, log_q.gather(1, ids), atol=1e-4)
        top = {"student": [log_p], "teacher": [log_q], "union": [log_p, log_q], "full": [log_p]}[of]
        for log in top:  # the k-th most likely token is among the ids: none is likelier than all of them
            kth = log.topk(K, 1).values[:, -1]
            assert ((log.gather(1, ids) >= kth[:, None] - 1e-4).sum(1) >= K).all()
        losses.append(reverse_kl(log_p, log_q, ids).mean())
    row = read_jsonl(run[1] / "metrics.jsonl")[first_step(stage) - 1]
    assert row["divergence"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert row["loss"] == pytest.approx(row["divergence"], rel=1e-3)  # importance weights of a strict run are near 1
    assert (row["tail_mass"] < 1e-5) == (of == "full")
    assert (row["clipped"], row["loss_entropy"]) == (None, None)


def test_the_options_are_in_the_loss_as_their_formula_says(run: tuple[Path, Path], tiny_model: Path) -> None:
    stage = len(SUPPORTS)
    losses, entropies, clipped = [], [], []
    for sequence, log_p, log_q in distributions(run, tiny_model, stage):
        assert sequence.teacher is not None
        d = reverse_kl(log_p, log_q, torch.tensor(sequence.teacher.ids).long())
        entropy = -(log_p.exp() * log_p).sum(1)
        losses.append(min(1, LENGTH / len(d)) * (d.clamp(max=CLIP) - ENTROPY * entropy).mean())
        entropies.append(entropy)
        clipped.append(d > CLIP)
    row = read_jsonl(run[1] / "metrics.jsonl")[first_step(stage) - 1]
    assert row["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)
    assert row["loss_entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)
    assert row["clipped"] == pytest.approx(float(torch.cat(clipped).float().mean()))
    assert 0 < row["clipped"] < 1, "some tokens are clipped and some are not, or the test shows nothing"


def test_the_learner_alone_repeats_every_stage(run: tuple[Path, Path]) -> None:
    result = replayed(run[1])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert f"step {STEPS * (len(SUPPORTS) + 1)}: the same to the last bit of its state" in result.stdout


def test_a_second_run_has_the_same_bits(run: tuple[Path, Path], tmp_path: Path) -> None:
    config, run_dir = run
    finish(config, tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(run_dir)
