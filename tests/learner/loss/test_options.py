"""Options of the loss: each equals its formula on whole logits, in value and gradient."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sdft.learner.config import CHUNK_BYTES, FLOAT32_BYTES, Forward, ImportanceConfig, Jsd, LossConfig, Reverse, Sampled
from sdft.learner.loss.chunked import divergence_loss
from sdft.learner.loss.scaling import LogitScaling
from sdft.learner.loss.targets import Targets
from sdft.learner.loss.vocabulary import VOCABULARY_ROWS
from tests.learner.loss.test_loss import H, N, V, draw, full_divergence, make_targets

SCALING = LogitScaling(0.5, 4.0)


def coarse(log: Tensor, ids: Tensor) -> Tensor:
    """Return the distribution over `ids` [N, K] and one bucket for all other tokens: [N, K + 1], as logarithms."""
    inside = log.gather(1, ids)
    return torch.cat([inside, torch.log1p(-inside.exp().sum(1, keepdim=True))], 1)


def plain(given: list[Tensor], log_q: Tensor, targets: Targets, config: LossConfig) -> dict[str, Tensor]:
    """Return loss and figures from whole logits, by the formulas of docs/algorithms.md."""
    hidden, head, bias = given
    z = (hidden @ head.T + bias) * SCALING.multiplier
    log_p = torch.log_softmax(4.0 * torch.tanh(z / 4.0), -1)
    d = full_divergence(coarse(log_p, targets.teacher_ids), coarse(log_q, targets.teacher_ids), config)
    counted = d if config.clip is None else torch.minimum(d, torch.tensor(config.clip, dtype=d.dtype))
    own = log_p.detach().gather(1, targets.sampled_ids[:, None])[:, 0]
    weight = (own - targets.sampler_logprobs).exp().clamp(max=config.importance.cap)
    if config.importance.level == "sequence":
        weight = weight.view(3, 4).mean(1).repeat_interleave(4)
    entropy = -(log_p.exp() * log_p).sum(1)
    if config.length is not None:
        weight = weight * (config.length / targets.completion).clamp(max=1)
    return {
        "loss": (weight * (counted - config.entropy * entropy)).mean(),
        "divergence": d.mean(),
        "clipped": (d > counted).sum(),
        "entropy": entropy.sum() * (config.entropy > 0),
    }


@pytest.mark.parametrize("chunk", [3, 5, 100])  # 12 rows in sequences of 4: a part, one, or all at once
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {"divergence": Forward(clip=2.0)},
        {"divergence": Reverse(clip=0.8)},
        {"divergence": Jsd(beta=0.3, clip=0.2)},
        {"entropy": 0.3},
        {"length": 5},
        {"divergence": Reverse(clip=0.8), "entropy": 0.3, "length": 5},
    ],
)
def test_an_option_equals_its_formula_on_whole_logits_in_value_and_gradients(
    options: dict, level: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk * V * 8)  # rows of float64
    monkeypatch.setitem(FLOAT32_BYTES, "cpu", 2 * V * 4)
    monkeypatch.setitem(VOCABULARY_ROWS, "cpu", 16)
    g = torch.Generator().manual_seed(5)
    given = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((N, H), (V, H), (V,))]
    log_q = draw(5)[1]
    targets = make_targets(log_q, 8)
    config = LossConfig(**options, importance=ImportanceConfig(level=level, cap=1.5))

    ours = [x.clone().requires_grad_() for x in given]
    found = dict(
        zip(
            ("loss", "divergence", "mismatch", "tail", "clipped", "entropy"),
            divergence_loss(ours[0], ours[1], ours[2], targets, config, SCALING),
            strict=True,
        )
    )
    found["loss"].backward()
    theirs = [x.clone().requires_grad_() for x in given]
    expected = plain(theirs, log_q, targets, config)
    expected["loss"].backward()

    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value.detach().double(), atol=1e-9, rtol=1e-9)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)  # the sums of both gradients are in float32
    if config.clip is not None:
        assert 0 < expected["clipped"] < N, "some rows are clipped and some are not, or the test shows nothing"


def test_the_entropy_is_of_the_whole_vocabulary_whatever_the_support() -> None:
    """Its gradient is -p (log p + H). A teacher equal to the student leaves no other one."""
    logits, _ = draw(4)
    log_p = torch.log_softmax(logits, -1)
    for kind, k in ((Forward(top_k=1), 1), (Forward(top_k=20), 20), (Sampled(), 1)):
        z = logits.clone().requires_grad_()
        config = LossConfig(divergence=kind, importance=ImportanceConfig(level="off"), entropy=0.5)
        loss, *_ = divergence_loss(z, torch.eye(V, dtype=torch.float64), None, make_targets(log_p, k), config)
        loss.backward()
        entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
        torch.testing.assert_close(loss.detach(), -0.5 * entropy.mean())
        expected = 0.5 / N * log_p.exp() * (log_p + entropy)
        torch.testing.assert_close(z.grad, expected, atol=1e-7, rtol=1e-5)


def test_a_clipped_token_has_no_gradient_and_the_others_keep_theirs() -> None:
    logits, log_q = draw(3)
    head = torch.eye(V, dtype=torch.float64)
    targets = make_targets(log_q, 8)
    off = ImportanceConfig(level="off")
    whole, cut = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    divergence_loss(whole, head, None, targets, LossConfig(importance=off))[0].backward()
    loss, *_ = divergence_loss(cut, head, None, targets, LossConfig(divergence=Forward(clip=2.0), importance=off))
    loss.backward()
    config = LossConfig(importance=off)
    log_p = torch.log_softmax(logits, -1)
    d = full_divergence(coarse(log_p, targets.teacher_ids), coarse(log_q, targets.teacher_ids), config)
    assert 0 < (d > 2).sum() < N
    assert whole.grad is not None
    torch.testing.assert_close(cut.grad, torch.where((d > 2)[:, None], 0.0, whole.grad), atol=1e-6, rtol=1e-6)


def test_a_clip_that_no_token_reaches_is_refused() -> None:
    """The divergence of Jensen and Shannon is at most the entropy of (beta, 1 - beta)."""
    assert Jsd(clip=math.log(2) - 0.01).clip is not None
    with pytest.raises(ValidationError, match=r"clip 0.7 has no effect: with beta 0.5 no token's .* more than 0.693"):
        Jsd(clip=0.7)
