"""The fused operations: their formulas against autograd, and Triton's kernels against the formulas.

The kernels run in Triton's interpreter where Triton is installed (`make whole`), or on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sdft.learner.config import Forward, LossConfig, Reverse
from sdft.learner.gpu.check import BOUND, cases, fault, step_cases, steps_in_one_pass, usable
from sdft.learner.gpu.operations import fused
from sdft.learner.loss.divergences import gradient
from sdft.learner.loss.targets import Targets

TRITON = Path(".venv/triton").resolve()


def made(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_norm_adds_and_its_gradient_is_autograds() -> None:
    x, residual, weight, grad, grad_total = made(5, 24), made(5, 24) + 1, made(24), made(5, 24) * 2, made(5, 24) - 1
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    total = leaves[0] + leaves[1]
    expected = functional.rms_norm(total, (24,), leaves[2], 1e-5)
    torch.autograd.backward([expected, total], [grad, grad_total])
    out, its_total, scale = fused.add_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close((out, its_total), (expected.detach(), total.detach()))
    of_x, parts = fused.norm_backward(grad, grad_total, its_total, weight, scale)
    torch.testing.assert_close((of_x, of_x, parts.sum(0)), tuple(leaf.grad for leaf in leaves))
    alone, nothing, _ = fused.add_norm(its_total, None, weight, 1e-5)
    assert torch.equal(alone, out)
    assert nothing.numel() == 0


def test_the_gate_and_its_gradient_are_autograds() -> None:
    gate, up, grad = made(5, 12), made(5, 12) + 1, made(5, 12) * 2
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    expected = functional.silu(leaves[0]) * leaves[1]
    expected.backward(grad)
    out, both = fused.gated_backward(grad, gate, up)
    torch.testing.assert_close((fused.gated(gate, up), out), (expected.detach(), expected.detach()))
    torch.testing.assert_close(both, torch.cat([leaf.grad for leaf in leaves], -1))


def test_the_rotation_back_is_its_gradient() -> None:
    q, k, v, cos, sin = made(5, 3, 8), made(5, 2, 8), made(5, 2, 8) + 1, made(5, 8), made(5, 8) + 1
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    expected = [x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None] for x in leaves]
    torch.testing.assert_close(list(fused.rotary(q, k, cos, sin)), [x.detach() for x in expected])
    grads = [made(5, 3, 8) * 2, made(5, 2, 8) * 3]
    torch.autograd.backward(expected, grads)
    joined = fused.rotary_backward(*grads, v, cos, sin)
    torch.testing.assert_close(joined, torch.cat([x.flatten(1) for x in (*(leaf.grad for leaf in leaves), v)], -1))


def test_parts_of_a_sum_are_added_before_they_are_rounded() -> None:
    parts = made(9, 24)
    assert torch.equal(fused.column_sum(parts, torch.bfloat16), parts.sum(0).bfloat16())


def test_log_probs_and_the_gradient_of_the_logits_are_the_softmaxs() -> None:
    logits, ids = made(4, 30), torch.tensor([[3, 29], [0, 1], [7, 8], [5, 4]])
    out, normalizer = torch.empty(4, 2), torch.empty(4)
    fused.log_probs_(logits, ids, out, normalizer)
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(out, log_p.gather(1, ids))
    slope = made(4, 1)
    fused.softmax_gradient_(logits, normalizer, slope)
    torch.testing.assert_close(logits, log_p.exp() * slope)


@pytest.mark.parametrize("clip", [None, 0.15])
@pytest.mark.parametrize("vocabulary", [6, 40])  # the support is the vocabulary, or leaves a tail
@pytest.mark.parametrize("kind", [Forward, Reverse])
def test_the_divergence_and_its_gradient_are_autograds(kind: Any, vocabulary: int, clip: float | None) -> None:
    """One row has nearly all mass in the support, where the tail is limited; one has it in both distributions."""
    log_p, log_q = (torch.log_softmax(made(5, vocabulary) * x, -1)[:, :6] for x in (1.0, 2.0))
    if vocabulary > 6:
        for x in (log_p[3], log_p[4], log_q[4]):
            x.copy_(torch.log_softmax(x, -1))
    count = torch.zeros(5, dtype=torch.int64)
    targets = Targets(count, count, torch.zeros(5, 6, dtype=torch.int64), log_q, count, count, count, count)
    config = LossConfig(divergence=kind(top_k=6, clip=clip))
    scale = made(5).abs()
    expected = gradient(log_p, targets, scale, vocabulary, config, is_fused=False)
    torch.testing.assert_close(gradient(log_p, targets, scale, vocabulary, config, is_fused=True), expected)
    assert clip is None or (expected[1] > clip).any()


def test_the_kernels_in_tritons_interpreter_give_the_formulas() -> None:
    """In a process of its own: Triton reads the variable when it is imported, and this environment has no Triton."""
    if not TRITON.exists():
        pytest.skip("Triton is installed by `make whole`")
    environment = os.environ | {"PYTHONPATH": f"{Path.cwd()}:{TRITON}", "TRITON_INTERPRET": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.learner.gpu.interpreted"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.split() == ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", BOUND)
def test_formulas_pass_the_check_of_the_kernels(dtype: torch.dtype) -> None:
    assert fault(torch.device("cpu"), dtype, "cpu") is None


def test_the_check_finds_each_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result of every operation in turn is a little off."""
    given = torch.device("cpu"), torch.float32
    kinds: dict[Any, Any] = {kind: of for of in (cases, step_cases) for kind, _, _ in of(*given)}
    assert len(kinds) == 11
    for kind, of in kinds.items():
        formula = kind.cpu

        def wrong(*given: Any, formula: Any = formula) -> Any:
            made = formula(*given)
            spoiled = given if made is None else made
            (spoiled[0] if isinstance(spoiled, tuple) else spoiled)[-1] += 0.1
            return made

        for other in kinds:
            monkeypatch.setattr(other, "wrong", staticmethod(wrong if other is kind else other.cpu), raising=False)
        assert f"{kind.__name__} differs in torch.float32 by " in (
            fault(torch.device("cpu"), torch.float32, "wrong", of) or ""
        )


def test_without_triton_the_check_says_so_and_the_kernels_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """This environment has no Triton. On a machine with a GPU the learner would use plain layers."""
    assert "AddNorm fails in torch.bfloat16 (ModuleNotFoundError: No module named 'triton')" in (
        fault(torch.device("cpu"), torch.bfloat16, "cuda") or ""
    )
    assert not usable.__wrapped__("cpu", torch.bfloat16)
    assert "layers and loss: not used, so a step takes longer: AddNorm fails" in caplog.text
    assert not steps_in_one_pass.__wrapped__("cpu")
    assert "the fused kernel of AdamW: not used, so a step takes longer: AdamW fails" in caplog.text
    assert usable("meta", torch.bfloat16)
