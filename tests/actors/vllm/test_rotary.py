"""vLLM's rotary embedding on a CPU, as the extension makes it rotate each head."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

import sdft.actors.vllm.extension  # noqa: F401  replaces its forward_cpu

WHOLE, ROTATED = 192, 64  # numbers of a head, of which the last are rotated, as in DeepSeek's models


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_part_of_each_head_is_rotated_and_put_back(tokens: int, heads: int) -> None:
    """Also with one token and one head, as a worker of an engine that is split may have: its part is contiguous."""
    with set_current_vllm_config(VllmConfig()):
        rotary = RotaryEmbedding(ROTATED, ROTATED, 128, 10000, True, torch.float32)
    torch.manual_seed(0)
    query, key, positions = torch.randn(tokens, heads, WHOLE), torch.randn(tokens, 1, ROTATED), torch.arange(tokens) + 3
    flat = [x.reshape(tokens, -1).clone() for x in (query[..., -ROTATED:], key)]
    expected = rotary.forward_cpu(positions, *flat)
    of_query, of_key = rotary.forward_cpu(positions, query[..., -ROTATED:], key)
    query[..., -ROTATED:] = of_query
    assert torch.equal(query[..., -ROTATED:].reshape(tokens, -1), expected[0])
    assert torch.equal(of_key.reshape(tokens, -1), expected[1])
