"""Divergence computed in chunks against the plain formula on whole logits: peak extra memory and time.

    python -m benchmarks.loss [--device cuda]

It uses SmolLM2's head (49152 x 576) in the dtype of the device, K = 64, forward KL and sequences of 64 loss tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import device_parser, peak_mib, report, seconds_in_turn
from sdft.learner.config import Forward, LossConfig
from sdft.learner.loss.chunked import divergence_loss
from sdft.learner.loss.divergences import token_objective
from sdft.learner.loss.importance import importance_weights
from sdft.learner.loss.targets import Targets
from sdft.services.config.dtype import native_dtype

VOCABULARY, HIDDEN, K, SEQUENCE = 49152, 576, 64, 64
CONFIG = LossConfig(divergence=Forward(top_k=K))
TOKENS = (256, 1024, 2048, 4096)


def inputs(tokens: int, device: str) -> tuple[Tensor, Tensor, Targets]:
    """Random states, head and teacher. The values do not affect memory and time."""
    g, dtype = torch.Generator().manual_seed(0), getattr(torch, native_dtype(device))
    hidden = torch.randn(tokens, HIDDEN, generator=g).to(device, dtype).requires_grad_()
    head = (torch.randn(VOCABULARY, HIDDEN, generator=g) * 0.05).to(device, dtype).requires_grad_()
    ids = (torch.arange(tokens)[:, None] * 31 + torch.arange(K) * (VOCABULARY // K)) % VOCABULARY  # distinct in a row
    logprobs = torch.log_softmax(torch.randn(tokens, K, generator=g) * 2, -1) - 0.1
    targets = Targets(
        sampled_ids=ids[:, 0],
        sampler_logprobs=torch.full((tokens,), -11.0),
        teacher_ids=ids,
        teacher_logprobs=logprobs,
        teacher_sampled=logprobs[:, 0],
        sequence=torch.arange(tokens) // SEQUENCE,
        completion=torch.full((tokens,), float(SEQUENCE)),
        share=torch.full((tokens,), 1 / tokens),
    )
    return hidden, head, targets.to(device)


def chunked(tokens: int, device: str) -> Callable[[], object]:
    hidden, head, targets = inputs(tokens, device)

    def run() -> None:
        hidden.grad = head.grad = None
        divergence_loss(hidden, head, None, targets, CONFIG)[0].backward()

    return run


def plain(tokens: int, device: str) -> Callable[[], object]:
    """The same loss in its direct form: all logits, autograd."""
    hidden, head, targets = inputs(tokens, device)

    def run() -> None:
        hidden.grad = head.grad = None
        logits = (hidden @ head.T).float()
        with torch.no_grad():
            own = logits.gather(-1, targets.sampled_ids[:, None])[:, 0] - torch.logsumexp(logits, -1)
            weights = importance_weights(own, targets, CONFIG)
        (token_objective(logits, targets, CONFIG)[0] * weights * targets.share).sum().backward()

    return run


def main() -> None:
    device = device_parser(__doc__).parse_args().device
    rows = []
    for tokens in TOKENS:
        memory = {case.__name__: peak_mib(case, tokens, device) for case in (plain, chunked)}
        seconds = seconds_in_turn({"plain": plain(tokens, device), "chunked": chunked(tokens, device)}, rounds=3)
        rows.append(
            {
                "tokens": tokens,
                "plain MiB": memory["plain"],
                "chunked MiB": memory["chunked"],
                "memory ratio": memory["chunked"] / memory["plain"],
                "plain s": seconds["plain"],
                "chunked s": seconds["chunked"],
                "time ratio": seconds["chunked"] / seconds["plain"],
            }
        )
    title = f"Divergence, value and gradients: chunked against the plain formula, {native_dtype(device)} on {device}"
    report("loss", title, rows)


if __name__ == "__main__":
    main()
