"""Routers take the experts that a sampler chose, with their own weights for these."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdft.learner.model.experts import Replay, named_routers
from tests.models.families import FAMILIES, make_family_model

MIXTURES = ("Mixtral", "OLMoE", "Qwen3-MoE", "Qwen3-Next", "LFM2 with experts", "Granite 4", "gpt-oss", "DeepSeek-V3")
IDS = torch.arange(20, 37)[None]


def load(name: str, tokenizer: Path, folder: Path) -> PreTrainedModel:
    make_family_model(FAMILIES[name], folder, tokenizer)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def choices(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the logits of IDS and the experts that the routers choose: [T, routers, k]."""
    found: list[Tensor] = []
    hooks = [
        router.register_forward_hook(
            lambda _, __, out: found.append(next(part for part in out if part.dtype == torch.int64))
        )
        for _, router in named_routers(model)
    ]
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, torch.stack([ids.reshape(IDS.shape[1], -1) for ids in found], 1)


@pytest.mark.parametrize("name", MIXTURES)
def test_given_experts_are_chosen_and_unknown_ones_are_the_routers(name: str, tiny_model: Path, tmp_path: Path) -> None:
    model = load(name, tiny_model, tmp_path)
    plain, own = choices(model)
    replay = Replay(model)
    replay.chosen = own
    assert torch.equal(choices(model)[0], plain)
    other = (own + 1) % 4
    replay.chosen = other
    changed, taken = choices(model)
    assert torch.equal(taken, other)
    assert not torch.allclose(changed, plain, atol=1e-4)
    replay.chosen = torch.where(torch.arange(IDS.shape[1])[:, None, None] < 9, -1, other)
    half, taken = choices(model)
    torch.testing.assert_close(half[:, :9], plain[:, :9], atol=1e-5, rtol=0)
    assert torch.equal(taken[9:], other[9:])
    replay.chosen = None
    assert torch.equal(choices(model)[0], plain)


def test_the_weights_of_given_experts_are_the_routers_own(tiny_model: Path, tmp_path: Path) -> None:
    """Mixtral's are the softmax of its logits, over the chosen experts."""
    model = load("Mixtral", tiny_model, tmp_path)
    replay = Replay(model)
    router = replay.routers[0]
    states, chosen = torch.randn(5, 128), torch.tensor([[0, 3], [3, 1], [2, 0], [1, 2], [0, 1]])
    replay.chosen = torch.stack([chosen] * len(replay.routers), 1)
    logits, weights, taken = router(states)
    expected = torch.softmax(logits, -1).gather(1, chosen)
    assert torch.equal(taken, chosen)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))


def test_a_model_without_experts_has_nothing_to_replay(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="the model has no routers"):
        Replay(AutoModelForCausalLM.from_pretrained(tiny_model))
