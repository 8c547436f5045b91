"""Packing: every sequence once, no padding, and shares that do not depend on the micro-batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    MistralModel,
    PreTrainedConfig,
    RwkvConfig,
)

from sdft.actors.shared.drafts import sequence_of
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import Rollout, SampleId, TeacherScores
from sdft.learner.config import Forward, LossConfig
from sdft.learner.model.attention import PACKED, packed_attention
from sdft.learner.model.cpu import short_attention
from sdft.learner.model.forward import hidden_states, why_alone
from sdft.learner.model.student import SelfDistillation, load_student
from sdft.learner.packing import pack
from sdft.learner.shares import assign, micro_batches
from tests.fakes.rollouts import make_rollouts

LENGTHS = [7, 90, 31, 31, 4, 55, 12, 3, 64]


def sample(prompt: int, completion: int, k: int = 2, skip: int = 3) -> TrainingSequence:
    ids = np.arange(completion, dtype=np.int32)
    logprobs = np.full(completion, -1.0, dtype=np.float32)
    rollout = Rollout(np.arange(prompt, dtype=np.int32), ids, logprobs, ((0, 0, completion),), "stop")
    scores = TeacherScores(np.stack([ids] * k, 1), np.stack([logprobs] * k, 1), logprobs, 0)
    return sequence_of(SampleId(0, 0, 0, 0), rollout, scores, skip)


@pytest.mark.parametrize(("ranks", "apart"), [(1, 0), (2, 3), (3, 2), (12, 90)])
def test_every_sequence_goes_to_one_rank_and_the_loads_are_level(ranks: int, apart: int) -> None:
    shares = assign(LENGTHS, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(LENGTHS)))
    loads = [sum(LENGTHS[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= apart


def test_micro_batches_hold_every_sequence_once_and_keep_the_budget() -> None:
    bins = micro_batches(LENGTHS, 70)
    assert sorted(i for b in bins for i in b) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[i] for i in b) <= 70 or len(b) == 1 for b in bins)
    assert [[LENGTHS[i] for i in b] for b in bins] == [[90], [64, 4], [55, 12, 3], [31, 31, 7]]


def test_a_pack_has_no_padding_and_positions_that_begin_anew() -> None:
    batch = pack([sample(3, 5), sample(2, 4)], batch_size=2, top_k=2)
    assert batch.lengths == (8, 6)
    assert batch.position_ids.tolist() == [*range(8), *range(6)]
    # The rows that predict completion tokens 3 and 4 of the first sample (positions 6, 7) and token 3 of the second
    # (13).
    assert batch.predicting.tolist() == [5, 6, 12]
    assert batch.targets.sampled_ids.tolist() == [3, 4, 3]
    assert batch.targets.share.tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert batch.targets.completion.tolist() == [5, 5, 4]  # with the tokens that are left out of the loss


def test_a_completion_no_longer_than_what_is_skipped_has_no_rows() -> None:
    batch = pack([sample(4, 3), sample(4, 1)], batch_size=2, top_k=2)
    assert len(batch.predicting) == len(batch.targets.share) == 0
    assert batch.targets.teacher_ids.shape == (0, 2)


def test_a_rank_without_work_still_has_a_batch_to_compute() -> None:
    batch = pack([], batch_size=2, top_k=2)
    assert len(batch.input_ids) == sum(batch.lengths) == 2
    assert len(batch.predicting) == 0


def test_loss_and_gradient_do_not_depend_on_order_or_micro_batches(tiny_model: Path) -> None:
    rollouts = make_rollouts(tiny_model, 6, k=8, seed=1, skip=3)
    model = SelfDistillation(load_student(tiny_model, torch.float32), LossConfig(divergence=Forward(top_k=8)))

    def result(order: list[int], budget: int) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        members = [rollouts[i] for i in order]
        total = 0.0
        for indices in micro_batches([len(s) for s in members], budget):
            loss, *_ = model(pack([members[i] for i in indices], len(rollouts), 8))
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    value, gradient = result([0, 1, 2, 3, 4, 5], 10_000)
    for order, budget in (([5, 3, 1, 0, 2, 4], 10_000), ([0, 1, 2, 3, 4, 5], 60), ([4, 2, 0, 5, 1, 3], 1)):
        other, its_gradient = result(order, budget)
        assert other == pytest.approx(value, rel=1e-6)
        assert (its_gradient - gradient).norm() <= 1e-6 * gradient.norm()


def test_gradient_checkpointing_changes_neither_loss_nor_gradient(tiny_model: Path) -> None:
    batch = pack(make_rollouts(tiny_model, 4, k=8, seed=2, skip=3), 4, 8)
    results = []
    for checkpointing in (False, True):
        model = SelfDistillation(load_student(tiny_model, torch.float32), LossConfig(divergence=Forward(top_k=8)))
        if checkpointing:
            model.model.gradient_checkpointing_enable()
        loss, *_ = model(batch)
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters() if p.grad is not None]))
    (loss, gradient), (its_loss, its_gradient) = results
    assert its_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(gradient, its_gradient, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# Short ones, the second list with padding; two whose attention weights are not kept; two too long for groups.
@pytest.mark.parametrize("lengths", [(5, 7, 9), (5, 8, 10, 9), (3,), (1, 1, 9), (200, 195, 9), (300, 280)])
@pytest.mark.parametrize("cached", [1, 200, 10_000])  # scores of a head at once: one sequence, several, all
def test_attention_of_packed_sequences_is_that_of_each_alone(
    lengths: tuple[int, ...], dtype: torch.dtype, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdft.learner.model.cpu.short_attention.SCORES", cached)
    short_attention.length_groups.cache_clear()
    short_attention._order.cache_clear()
    torch.manual_seed(0)
    tokens = sum(lengths)
    query = torch.randn(1, 6, tokens, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(1, 2, tokens, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, lengths=lengths)
    alone = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    expected = torch.cat(alone, dim=2).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-6)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad((out * direction).sum(), (query, key, value))
    for mine, theirs in zip(
        gradients, torch.autograd.grad((expected * direction).sum(), (query, key, value)), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_windowed_attention_equals_the_models_own() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "sliding_window": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    )
    model, lengths = MistralModel._from_config(config, attn_implementation="eager"), (20, 5, 9)
    ids = torch.randint(64, (sum(lengths),))
    alone = torch.cat([model(part[None]).last_hidden_state[0] for part in ids.split(lengths)])
    model.set_attn_implementation(PACKED)
    positions = torch.cat([torch.arange(n) for n in lengths])
    torch.testing.assert_close(hidden_states(model, ids, positions, lengths), alone)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), None),
        (MambaConfig(num_hidden_layers=2), None),
        (Gemma2Config(num_hidden_layers=2), None),
        (RwkvConfig(num_hidden_layers=2), "layers of the type rwkv carry something from each token to the next"),
    ],
)
def test_a_model_packs_unless_its_layers_would_mix_the_sequences(config: PreTrainedConfig, reason: str | None) -> None:
    assert why_alone(config) == reason


@pytest.mark.parametrize("lengths", [(130, 121, 30), (500, 410), (600, 20)])  # the last: too long for matrix products
def test_attention_in_bfloat16_is_a_rounding_from_exact(lengths: tuple[int, ...]) -> None:
    """Compared with float64 on the same inputs. bfloat16 keeps 2**-8, and the backward rounds its weights again."""
    torch.manual_seed(0)
    shapes = ((1, 6, sum(lengths), 8), (1, 2, sum(lengths), 8), (1, 2, sum(lengths), 8))
    given = [torch.randn(shape).bfloat16() for shape in shapes]
    direction = torch.randn(1, sum(lengths), 6, 8).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        query, key, value = (x.to(dtype).requires_grad_() for x in given)
        out, _ = packed_attention(torch.nn.Module(), query, key, value, None, lengths=lengths)
        found.append([out, *torch.autograd.grad(out, (query, key, value), direction.to(dtype))])
    for rounded, exact in zip(*found, strict=True):
        assert (rounded.double() - exact).norm() < 2**-7 * exact.norm()
