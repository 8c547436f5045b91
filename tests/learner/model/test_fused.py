"""The fused layers, with the plain formulas of their operations: values and gradients are those of plain layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5Config,
    GraniteConfig,
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from sdft.learner.model.attention import PACKED
from sdft.learner.model.cpu.last_layer import only_where_read
from sdft.learner.model.forward import hidden_states
from sdft.learner.model.fused import fuse

LENGTHS = (5, 9, 1)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FUSED = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**{name: size for name, size in SIZES.items() if name != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=4),
}
Make = Callable[[], PreTrainedModel]


def made(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED)
    for p in model.parameters():  # norms of ones and biases of zeros would hide mistakes
        nn.init.normal_(p, 0.5 if p.dim() == 1 else 0, 0.3)
    return model.train()


def gradients(model: PreTrainedModel, read: Tensor | None = None) -> dict[str, Tensor]:
    """Return hidden states, and the gradients of a weighted sum of them."""
    torch.manual_seed(1)
    ids, positions = torch.randint(50, (sum(LENGTHS),)), torch.cat([torch.arange(n) for n in LENGTHS])
    states = hidden_states(model, ids, positions, LENGTHS, read)
    (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"states": states.detach()}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest relative difference."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - x).norm() / x.norm()) for name, x in theirs.items() if x.norm() > 0)


# Layers with Llama's code whose attention rotates by another function, or has no window though one is configured.
ALIKE = {
    "ernie": lambda: Ernie4_5Config(**SIZES),
    "helium": lambda: HeliumConfig(**SIZES),
    "llama with a window that it does not use": lambda: LlamaConfig(**SIZES, sliding_window=3),
}


@pytest.mark.parametrize("family", ALIKE)
def test_attention_that_only_looks_like_llamas_is_left_alone(family: str) -> None:
    model = made(ALIKE[family]())
    plain = gradients(model)
    fuse(model, ["cpu"])
    assert worst(gradients(model), plain) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_states_and_gradients_are_those_of_plain_layers(family: str, checkpointing: bool) -> None:
    model = made(FUSED[family]())
    if checkpointing:
        model.gradient_checkpointing_enable()
    plain = gradients(model)
    assert fuse(model, ["cpu"]) == SIZES["num_hidden_layers"]
    assert worst(gradients(model), plain) < 1e-5


def test_in_half_precision_they_are_as_near_to_the_exact_ones() -> None:
    model = made(FUSED["qwen2"](), torch.bfloat16)
    plain = gradients(model)
    exact = gradients(made(FUSED["qwen2"]()))
    fuse(model, ["cpu"])
    assert worst(gradients(model), exact) < 1.1 * worst(plain, exact) < 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_part_is_fused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the comparisons above would compare plain layers with plain layers."""
    from sdft.learner.model import fused

    model, called = made(FUSED[family]()), set[str]()
    for kind in (fused.Normed, fused.AddNormed, fused.Projected, fused.GatedNetwork, fused.Rotated):

        def noted(*given: Any, apply: Callable[..., Any] = kind.apply, name: str = kind.__name__) -> Any:
            called.add(name)
            return apply(*given)

        monkeypatch.setattr(kind, "apply", noted)
    fuse(model, ["cpu"])
    gradients(model)
    between = {"Rotated"} if family == "qwen3" else set()  # norms of queries and keys stand before the rotation
    assert called == {"Normed", "AddNormed", "Projected", "GatedNetwork"} | between


def test_layers_stay_plain_on_other_devices() -> None:
    model = made(FUSED["qwen2"]())
    plain = gradients(model)
    fuse(model, ["cuda"])
    ours = gradients(model)
    assert all(torch.equal(ours[name], x) for name, x in plain.items())


@pytest.mark.parametrize("config", [Olmo2Config(**SIZES), GraniteConfig(**SIZES, residual_multiplier=0.5)])
def test_layers_with_other_code_are_left_alone(config: Any) -> None:
    model = made(config)
    plain = gradients(model)
    assert fuse(model, ["cpu"]) == 0
    assert all(torch.equal(x, plain[name]) for name, x in gradients(model).items())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "down_proj"], ["gate_proj", "up_proj", "o_proj"]])
def test_adapters_of_some_layers_work_as_with_plain_layers(targets: list[str]) -> None:
    """Adapters are added to the model after its layers are fused."""

    def with_adapters(model: PreTrainedModel) -> PreTrainedModel:
        torch.manual_seed(2)
        get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        return model

    plain, ours = made(FUSED["qwen2"]()), made(FUSED["qwen2"]())
    fuse(ours, ["cpu"])
    expected = gradients(with_adapters(plain))
    assert any("lora" in name for name in expected)
    assert worst(gradients(with_adapters(ours)), expected) < 1e-5


def test_the_last_network_computes_only_the_rows_that_are_read() -> None:
    read = torch.tensor([2, 9])
    plain, ours = made(FUSED["qwen2"]()), made(FUSED["qwen2"]())
    fuse(ours, ["cpu"])
    assert only_where_read(plain)
    assert only_where_read(ours)
    assert worst(gradients(ours, read), gradients(plain, read)) < 1e-5
