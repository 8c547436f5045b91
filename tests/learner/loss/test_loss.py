"""The divergence equals the plain formula over the full vocabulary, in value and gradient."""

import dataclasses

import pytest
import torch

from benchmarks.loss import chunked
from benchmarks.measure import peak_mib
from sdft.learner.config import (
    CHUNK_BYTES,
    FLOAT32_BYTES,
    Dft,
    Forward,
    ImportanceConfig,
    Jsd,
    LossConfig,
    Nll,
    Reverse,
    Sampled,
)
from sdft.learner.loss.chunked import divergence_loss
from sdft.learner.loss.divergences import divergence, log1mexp, token_objective, with_tail
from sdft.learner.loss.scaling import LogitScaling
from sdft.learner.loss.targets import Targets
from sdft.learner.loss.vocabulary import VOCABULARY_ROWS

V, H, N = 50, 16, 12
OFF = ImportanceConfig(level="off")
KINDS = {
    "forward": Forward(),
    "reverse": Reverse(),
    "jsd": Jsd(beta=0.3),
    "sampled": Sampled(),
    "nll": Nll(),
    "dft": Dft(),
}


def make_targets(log_q: torch.Tensor, k: int) -> Targets:
    top = log_q.topk(k, -1)
    sampled = torch.arange(N) % V
    return Targets(
        sampled_ids=sampled,
        sampler_logprobs=torch.full((N,), -3.0, dtype=log_q.dtype),
        teacher_ids=top.indices,
        teacher_logprobs=top.values,
        teacher_sampled=log_q.gather(1, sampled[:, None])[:, 0],
        sequence=torch.arange(N) // 4,
        completion=torch.tensor([6.0, 3.0, 9.0], dtype=log_q.dtype).repeat_interleave(4),
        share=torch.full((N,), 1 / N, dtype=log_q.dtype),
    )


def full_divergence(logits: torch.Tensor, log_q: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """The textbook formula over the whole vocabulary."""
    p, q = torch.softmax(logits, -1), log_q.exp()
    if config.divergence.type == "forward":
        return (q * torch.log(q / p)).sum(-1)
    if config.divergence.type == "reverse":
        return (p * torch.log(p / q)).sum(-1)
    assert isinstance(config.divergence, Jsd)
    beta = config.divergence.beta
    m = (1 - beta) * p + beta * q
    return beta * (q * torch.log(q / m)).sum(-1) + (1 - beta) * (p * torch.log(p / m)).sum(-1)


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=g, dtype=torch.float64) * 2
    return logits, torch.log_softmax(torch.randn(N, V, generator=g, dtype=torch.float64) * 2, -1)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_top_k_of_the_whole_vocabulary_is_the_full_formula_in_value_and_gradient(name: str) -> None:
    logits, log_q = draw()
    config = LossConfig(divergence=KINDS[name], importance=OFF)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, _ = token_objective(ours, make_targets(log_q, V), config)
    expected = full_divergence(theirs, log_q, config)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-6)


def test_the_logit_gradient_of_forward_kl_is_p_minus_q() -> None:
    logits, log_q = draw(1)
    logits.requires_grad_()
    value, _ = token_objective(logits, make_targets(log_q, V), LossConfig(importance=OFF))
    value.sum().backward()
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), -1) - log_q.exp(), atol=1e-9, rtol=1e-6)


def test_the_logit_gradient_of_reverse_kl_is_p_times_the_centred_log_ratio() -> None:
    logits, log_q = draw(2)
    logits.requires_grad_()
    value, _ = token_objective(logits, make_targets(log_q, V), LossConfig(divergence=Reverse(), importance=OFF))
    value.sum().backward()
    log_p = torch.log_softmax(logits.detach(), -1)
    expected = log_p.exp() * (log_p - log_q - value.detach()[:, None])
    torch.testing.assert_close(logits.grad, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_a_tail_bucket_bounds_the_full_divergence_from_below(name: str, k: int) -> None:
    logits, log_q = draw(3)
    config = LossConfig(divergence=KINDS[name], importance=OFF)
    value, _ = token_objective(logits, make_targets(log_q, k), config)
    full = full_divergence(logits, log_q, config)
    assert (value <= full + 1e-12).all()
    assert (value >= -1e-12).all()
    assert (value < full - 1e-6).any(), "with the vocabulary cut something must be lost, or the test shows nothing"


def test_the_tail_makes_both_sides_whole_distributions() -> None:
    log_q = draw(4)[1]
    cut = with_tail(log_q.topk(7, -1).values, V)
    torch.testing.assert_close(cut.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    assert cut.shape == (N, 8)


def test_log1mexp_is_accurate_at_both_ends() -> None:
    x = torch.tensor([-1e-10, -1e-3, -0.6931, -1.0, -40.0], dtype=torch.float64)
    expected = torch.tensor([-23.025850930, -6.908255279, -0.693194364, -0.458675145, -4.248354e-18])
    torch.testing.assert_close(log1mexp(x), expected.double(), atol=1e-8, rtol=1e-6)


def test_nll_is_the_cross_entropy_of_the_given_tokens() -> None:
    logits, log_q = draw(8)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    targets = make_targets(log_q, 1)
    objective, value = token_objective(ours, targets, LossConfig(divergence=Nll(), importance=OFF))
    expected = torch.nn.functional.cross_entropy(theirs, targets.sampled_ids, reduction="none")
    torch.testing.assert_close(value, expected.detach())
    objective.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_dft_weights_each_tokens_cross_entropy_by_its_probability_without_gradient_through_that() -> None:
    """The gradient is that of -p(y): p (p(y) - [y])."""
    logits, log_q = draw(9)
    logits.requires_grad_()
    targets = make_targets(log_q, 1)
    objective, value = token_objective(logits, targets, LossConfig(divergence=Dft(), importance=OFF))
    p = torch.softmax(logits.detach(), -1)
    own = p.gather(1, targets.sampled_ids[:, None])
    torch.testing.assert_close(value, -own[:, 0].log())
    torch.testing.assert_close(objective.detach(), -(own * own.log())[:, 0])
    objective.sum().backward()
    one_hot = torch.nn.functional.one_hot(targets.sampled_ids, V)
    torch.testing.assert_close(logits.grad, own * (p - one_hot))


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd", "sampled", "nll", "dft"])
@pytest.mark.parametrize("level", ["off", "token", "sequence"])
@pytest.mark.parametrize("chunk", [3, 5, 9, 100])  # 12 rows in sequences of 4: a part, one, two, or all at once
@pytest.mark.parametrize("scaling", [LogitScaling(), LogitScaling(cap=3.0), LogitScaling(0.25), LogitScaling(2.0, 5.0)])
def test_chunked_loss_equals_the_formula_on_whole_logits_in_value_and_both_gradients(
    name: str, level: str, chunk: int, scaling: LogitScaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk * V * 8)  # rows of float64
    monkeypatch.setitem(FLOAT32_BYTES, "cpu", 2 * V * 4)
    monkeypatch.setitem(VOCABULARY_ROWS, "cpu", 16)
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64)
    head = torch.randn(V, H, generator=g, dtype=torch.float64)
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    log_q = draw(5)[1]
    config = LossConfig(divergence=KINDS[name], importance=ImportanceConfig(level=level, cap=1.5))
    targets = make_targets(log_q, 8)

    ours = [x.clone().requires_grad_() for x in (hidden, head, bias)]
    loss, *figures = divergence_loss(ours[0], ours[1], ours[2], targets, config, scaling)
    loss.backward()

    plain = [x.clone().requires_grad_() for x in (hidden, head, bias)]
    logits = (plain[0] @ plain[1].T + plain[2]) * scaling.multiplier
    if scaling.cap is not None:
        logits = scaling.cap * torch.tanh(logits / scaling.cap)
    objective, value = token_objective(logits, targets, config)
    own = torch.log_softmax(logits, -1).gather(1, targets.sampled_ids[:, None])[:, 0].detach()
    ratio = (own - targets.sampler_logprobs).exp().clamp(max=1.5)
    weight = {"off": torch.ones(N), "token": ratio, "sequence": ratio.view(3, 4).mean(1).repeat_interleave(4)}[level]
    (objective * weight / N).sum().backward()

    torch.testing.assert_close(loss.detach(), (value * weight / N).sum().detach(), atol=1e-9, rtol=1e-9)
    difference = own - targets.sampler_logprobs
    tail = N - targets.teacher_logprobs.exp().sum()
    off = torch.zeros((), dtype=torch.float64)  # nothing is clipped, and the loss has no entropy
    expected = [value.detach().mean(), (difference.exp() - 1 - difference).sum(), tail, off, off]
    torch.testing.assert_close(figures, expected, atol=1e-9, rtol=1e-9)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)  # the sums of both gradients are in float32


@pytest.mark.parametrize("chunk", [5, 100])
def test_rows_beyond_the_tokenizer_are_in_no_distribution(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and its gradients are those of a head without these rows, which get no gradient."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk * V * 8)  # rows of float64
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64)
    head = torch.randn(V + 3, H, generator=g, dtype=torch.float64)
    bias = torch.randn(V + 3, generator=g, dtype=torch.float64)
    targets = make_targets(draw(5)[1], 8)
    padded = [x.clone().requires_grad_() for x in (hidden, head, bias)]
    plain = [x.clone().requires_grad_() for x in (hidden, head[:V], bias[:V])]
    ours = divergence_loss(padded[0], padded[1], padded[2], targets, LossConfig(), vocabulary=V)
    expected = divergence_loss(plain[0], plain[1], plain[2], targets, LossConfig())
    torch.testing.assert_close(ours, expected)
    ours[0].backward()
    expected[0].backward()
    assert padded[1].grad is not None
    assert padded[2].grad is not None
    assert not padded[1].grad[V:].any()
    assert not padded[2].grad[V:].any()
    for a, b in zip(padded, plain, strict=True):
        torch.testing.assert_close(a.grad[: len(b)], b.grad)


@pytest.mark.parametrize("kept", [True, False])
def test_the_loss_restores_torchs_setting_of_deterministic_algorithms(kept: bool) -> None:
    log_q = draw(5)[1]
    hidden, head = torch.randn(N, H).requires_grad_(), torch.randn(V, H).requires_grad_()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(kept)
    try:
        divergence_loss(hidden, head, None, make_targets(log_q.float(), 8), LossConfig())
        assert torch.are_deterministic_algorithms_enabled() == kept
    finally:
        torch.use_deterministic_algorithms(before)


def test_the_sampled_estimator_has_the_gradient_of_reverse_kl_on_average() -> None:
    g = torch.Generator().manual_seed(6)
    logits = torch.randn(1, V, generator=g, dtype=torch.float64).repeat(V, 1).requires_grad_()
    log_q = torch.log_softmax(torch.randn(1, V, generator=g, dtype=torch.float64), -1).repeat(V, 1)
    every = torch.arange(V)  # each token once, weighted by its probability: the exact expectation
    base = make_targets(draw()[1], 4)
    targets = dataclasses.replace(base, sampled_ids=every, teacher_sampled=log_q[0])
    objective, _ = token_objective(logits, targets, LossConfig(divergence=Sampled()))
    p = torch.softmax(logits.detach()[0], -1)
    (objective * p).sum().backward()
    one = logits.detach()[:1].clone().requires_grad_()
    divergence(torch.log_softmax(one, -1), log_q[:1], LossConfig(divergence=Reverse())).sum().backward()
    torch.testing.assert_close(logits.grad.sum(0), one.grad[0], atol=1e-9, rtol=1e-6)


def test_no_gradient_reaches_the_teacher() -> None:
    logits, log_q = draw(7)
    log_q = log_q.requires_grad_()
    value, _ = token_objective(logits.requires_grad_(), make_targets(log_q, 8), LossConfig())
    value.sum().backward()
    assert log_q.grad is None


def test_a_teacher_equal_to_the_student_gives_zero_loss_and_gradient() -> None:
    logits, _ = draw(8)
    log_q = torch.log_softmax(logits, -1)
    logits.requires_grad_()
    value, _ = token_objective(logits, make_targets(log_q, 8), LossConfig())
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.zeros(N, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-12, rtol=0)


def test_no_rows_give_zero_loss_and_zero_gradient_not_nan() -> None:
    hidden = torch.zeros(0, H, requires_grad=True)
    head = torch.randn(V, H, requires_grad=True)
    empty = Targets(
        sampled_ids=torch.zeros(0).long(),
        sampler_logprobs=torch.zeros(0),
        teacher_ids=torch.zeros(0, 4).long(),
        teacher_logprobs=torch.zeros(0, 4),
        teacher_sampled=torch.zeros(0),
        sequence=torch.zeros(0).long(),
        completion=torch.zeros(0),
        share=torch.zeros(0),
    )
    for level in ("off", "token", "sequence"):
        loss, *_ = divergence_loss(hidden, head, None, empty, LossConfig(importance=ImportanceConfig(level=level)))
        loss.backward()
        assert loss.item() == 0.0
    assert head.grad is not None
    assert (head.grad == 0).all()


def test_memory_is_that_of_one_chunk_and_of_the_heads_gradient() -> None:
    """For SmolLM2's head: 96 MiB of logits and 108 MiB of a gradient in float32. Whole logits are 192 MiB."""
    assert peak_mib(chunked, 1024, "cpu") < 250
