"""The last feed-forward network computes only the rows that are read: loss and gradient stay the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from sdft.learner.model.attention import PACKED
from sdft.learner.model.cpu.last_layer import only_where_read
from sdft.learner.model.faithful import unfaithful
from sdft.learner.model.student import hidden_states, load_student

LENGTHS = (5, 7)


def read_states(model: PreTrainedModel, read: Tensor, *, whole: bool) -> tuple[Tensor, list[Tensor], list[int]]:
    """Return the hidden states that are read, the gradients of a weighted sum of them, and the rows that the network
    computed."""
    torch.manual_seed(0)
    ids = torch.randint(100, (sum(LENGTHS),))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    rows = list[int]()
    hook = model.base_model.layers[-1].mlp.up_proj.register_forward_hook(
        lambda _, given, __: rows.append(given[0].shape[1])
    )
    given = (model, ids, positions, LENGTHS)
    states = hidden_states(*given)[read] if whole else hidden_states(*given, read)
    (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
    hook.remove()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return states.detach(), gradients, rows


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("read", [(2, 3, 10), ()])  # () is that of a rank without work, which has a gradient of zeros
def test_only_the_rows_that_are_read_are_computed(tiny_model: Path, read: tuple[int, ...], checkpointing: bool) -> None:
    model = load_student(tiny_model, torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    index = torch.tensor(read, dtype=torch.int64)
    states, gradients, rows = read_states(model, index, whole=True)
    assert set(rows) == {sum(LENGTHS)}
    its_states, its_gradients, its_rows = read_states(model, index, whole=False)
    assert its_rows == [len(read)] * (1 + checkpointing)
    torch.testing.assert_close(its_states, states, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(its_gradients, gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_layers_that_do_not_get_the_rows_to_read_are_refused_at_the_start(tiny_model: Path) -> None:
    """Otherwise the learner would compute all rows without a message."""
    model = load_student(tiny_model, torch.float32)
    assert unfaithful(model) is None

    def drop(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        return given, {name: value for name, value in named.items() if name != "read"}

    model.base_model.layers[-1].register_forward_pre_hook(drop, prepend=True, with_kwargs=True)
    assert "its layers do not pass the argument `read` on" in (unfaithful(model) or "")


def test_a_network_of_another_kind_is_not_changed() -> None:
    model = Qwen2ForCausalLM._from_config(
        Qwen2Config(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        ),
        attn_implementation=PACKED,
    )
    layer = model.base_model.layers[-1]
    layer.mlp = torch.nn.Sequential(torch.nn.Linear(16, 16))
    own = layer.mlp.forward
    assert not only_where_read(model)
    assert layer.mlp.forward == own
