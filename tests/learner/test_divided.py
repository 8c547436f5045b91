"""Ranks that divide the tokens of a micro-batch: the same steps as one rank that has all of them."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Lfm2Config, MistralConfig

from sdft.learner.config import LearnerConfig, LoraConfig
from sdft.learner.divided import part_of
from sdft.learner.division import why_not
from sdft.learner.group import LearnerGroup
from sdft.learner.model.architecture import Untrainable
from sdft.learner.packing import pack
from sdft.learner.types import StepResult
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import PROBE, SKIP, STEPS, K, apart, settings, worst

Trained = tuple[list[StepResult], dict[str, np.ndarray], dict[str, np.ndarray]]
GROUP: Any = None  # of no processes: the parts are only cut


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four heads, two of keys, whose attention has a window."""
    torch.manual_seed(0)
    config = MistralConfig(
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 24, "initializer_range": 0.08},
    )
    folder = tmp_path_factory.mktemp("windowed")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


async def trained(model: Path, stage: int, ranks: int, together: int, dtype: str, **config: Any) -> Trained:
    given = settings(model, stage, ranks, dtype, sequence_parallel=together, **config)
    group = await LearnerGroup.start(given, PROBE, [{"num_cpus": 0.5}] * ranks)
    results = [await group.train_step(make_rollouts(model, 5, K, seed, SKIP)) for seed in range(STEPS)]
    student, teacher = [await group.parameters(role) for role in ("student", "teacher")]
    for worker in group.workers:
        worker.__ray_terminate__.remote()
    return results, student, teacher


@pytest.mark.parametrize(
    ("shape", "stage", "ranks", "together", "config"),
    [
        pytest.param("tiny", 1, 2, 2, {}, marks=pytest.mark.whole),
        pytest.param("tiny", 3, 2, 2, {"gradient_checkpointing": True}, marks=pytest.mark.whole),
        pytest.param("tiny", 1, 2, 2, {"lora": LoraConfig(rank=4)}, marks=pytest.mark.whole),
        pytest.param("windowed", 1, 4, 2, {}, marks=pytest.mark.whole),
        # Keys are repeated, and every sequence is alone.
        pytest.param("windowed", 1, 4, 4, {"micro_batch_tokens": 10}, marks=pytest.mark.whole),
    ],
)
def test_steps_of_ranks_that_divide_tokens_equal_those_of_one(
    ray_cluster: None,
    tiny_model: Path,
    windowed: Path,
    shape: str,
    stage: int,
    ranks: int,
    together: int,
    config: dict[str, Any],
) -> None:
    model = tiny_model if shape == "tiny" else windowed

    async def run() -> None:
        results, student, teacher = await trained(model, stage, ranks, together, "float32", **config)
        expected, whole, its_teacher = await trained(model, 1, 1, 1, "float32", **config)
        for ours, theirs in zip(results, expected, strict=True):
            figures = [(r.loss, r.divergence, r.mismatch_kl, r.tail_mass, r.grad_norm) for r in (ours, theirs)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-4)
            assert (ours.loss_tokens, ours.completions) == (theirs.loss_tokens, theirs.completions)
        for a, b in ((student, whole), (teacher, its_teacher)):
            assert worst(a, b) < 1e-5
            assert apart(a, b) < 1e-3 * apart(student, teacher)

    asyncio.run(run())


def test_every_token_and_every_row_is_of_one_rank(tiny_model: Path) -> None:
    """The states that ranks send are those that their receivers' rows need, in their order."""
    sequences = make_rollouts(tiny_model, 6, K, 0, SKIP)
    whole = pack(sequences, 6, K)
    for size in (2, 3, 4):
        parts = [part_of(whole, GROUP, rank, size) for rank in range(size)]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
        assert torch.equal(torch.cat([part.position_ids for part in parts]), whole.position_ids)
        starts = np.cumsum([0, *(len(part.input_ids) for part in parts)])
        read = [part.predicting + int(start) for part, start in zip(parts, starts, strict=False)]
        sent = [r.split(list(part.division.sent)) for r, part in zip(read, parts, strict=True) if part.division]
        seen = []
        for rank, part in enumerate(parts):
            assert part.division is not None
            assert part.lengths == whole.lengths
            places = torch.cat([of_source[rank] for of_source in sent])
            assert [len(of_source[rank]) for of_source in sent] == list(part.division.received)
            rows = torch.isin(whole.predicting, places)
            assert torch.equal(whole.predicting[rows], places)
            assert torch.equal(whole.targets.sampled_ids[rows], part.targets.sampled_ids)
            assert torch.equal(whole.targets.teacher_logprobs[rows], part.targets.teacher_logprobs)
            seen += places.tolist()
            of_rank = part.targets.sequence.unique().tolist()
            assert all(
                int((whole.targets.sequence == s).sum()) == int((part.targets.sequence == s).sum()) for s in of_rank
            )
        assert sorted(seen) == whole.predicting.tolist()


def test_a_pack_has_a_token_for_every_rank() -> None:
    batch = pack([], 1, K, least=4)
    assert (batch.lengths, len(batch.input_ids), len(batch.predicting)) == ((4,), 4, 0)
    parts = [part_of(batch, GROUP, rank, 4) for rank in range(4)]
    assert [len(part.input_ids) for part in parts] == [1] * 4


def test_heads_and_ranks_must_be_divisible() -> None:
    assert why_not(4, 2, 4) is None
    assert why_not(8, 2, 4) is None
    assert why_not(6, 6, 4) == "its 6 heads of queries and 6 of keys cannot be divided over 4 ranks"
    assert why_not(12, 3, 4) is not None
    with pytest.raises(ValidationError, match="sequence_parallel 2 must divide ranks 3"):
        LearnerConfig(ranks=3, sequence_parallel=2)


@pytest.mark.whole
def test_a_model_that_cannot_be_divided_is_refused(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    config = Lfm2Config(
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    async def start(model: Path, ranks: int) -> None:
        given = replace(settings(model, 1, ranks, sequence_parallel=ranks))
        await LearnerGroup.start(given, PROBE, [{"num_cpus": 0.5}] * ranks)

    with pytest.raises(Untrainable, match="layers carry something from each token to the next"):
        asyncio.run(start(tmp_path, 2))
    with pytest.raises(Untrainable, match="its 2 heads of queries and 1 of keys cannot be divided over 4 ranks"):
        asyncio.run(start(tiny_model, 4))
