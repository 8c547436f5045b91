"""RMSNorm: the same bits as the model's own forward, its gradient, and norms that are not replaced."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sdft.learner.model.cpu.norm import replace_norms

SIZE = 96


def norm(dtype: torch.dtype) -> LlamaRMSNorm:
    torch.manual_seed(0)
    module = LlamaRMSNorm(SIZE, eps=1e-5)
    module.weight.data = 1 + 0.3 * torch.randn(SIZE)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_models_own_and_the_gradient_as_good(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with float64: our gradient may not be further from it than that of torch's autograd."""
    monkeypatch.setattr("sdft.learner.model.cpu.norm.CACHED", 100 * SIZE)  # ten blocks
    torch.manual_seed(1)
    # With so many rows the sums of rounding errors differ by 1 %; with ten rows they differ by 12 %.
    x, grad = torch.randn(2, 500, SIZE).to(dtype), torch.randn(2, 500, SIZE).to(dtype)
    results = {}
    for name, module, kind in (
        ("exact", norm(dtype), torch.float64),
        ("plain", norm(dtype), dtype),
        ("ours", norm(dtype), dtype),
    ):
        inputs = x.to(kind, copy=True).requires_grad_()
        module.to(kind)
        if name == "exact":
            scale = torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + 1e-5)
            out = module.weight * (inputs * scale)
        else:
            if name == "ours":
                assert replace_norms(module) == 1
            out = module(inputs)
        out.backward(grad.to(kind))
        results[name] = (out.detach(), inputs.grad, module.weight.grad)
    assert torch.equal(results["ours"][0], results["plain"][0])
    for exact, plain, ours in zip(*(results[name][1:] for name in ("exact", "plain", "ours")), strict=True):
        assert (ours - exact).norm() <= 1.05 * (plain - exact).norm()
        assert (ours - exact).norm() < 0.01 * exact.norm()


def test_a_norm_with_another_forward_is_not_replaced() -> None:
    class Other(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 2

    model = nn.Sequential(norm(torch.float32), Other(SIZE), nn.LayerNorm(SIZE))
    x = torch.randn(3, SIZE)
    before = model(x)
    assert replace_norms(model) == 1
    assert torch.equal(model(x), before)
