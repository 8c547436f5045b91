"""Gradient with the teacher's top K against that with the whole vocabulary, on real rollouts of SmolLM2-135M.

    python -m benchmarks.gradient

The student samples on the tool example's prompts. The same model with the demonstration in its prompt scores the
rollouts, in float32. The first three tokens are left out of the loss. With the tail, all tokens outside the top K form
one bucket in both distributions. Without it, both distributions are cut to the top K and renormalized. The benchmark
reports the cosine and the relative difference |g_K - g| / |g| of the gradients, over every sixteenth element of every
parameter (22 whole gradients would take 12 GB).
Writes results/gradient.json and gradient.svg beside this file.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.measure import report
from sdft.actors.shared.types import IntArray
from sdft.learner.config import Forward, LossConfig, Reverse
from sdft.learner.loss.divergences import divergence, with_tail
from sdft.services.config.load import load_config
from sdft.services.planning.prepare import prepare

EXAMPLE = Path("examples/tools/tools.yaml")
PROMPTS, NEW_TOKENS, SKIP, SUPPORTS = 16, 48, 3, (1, 8, 20, 64, 256)
LOSSES = {"forward": LossConfig(divergence=Forward()), "reverse": LossConfig(divergence=Reverse())}
STRIDE = 16


@torch.no_grad()
def sample(model: Any, prompt: IntArray, seed: int, end: int) -> Tensor:
    """Sample a completion at temperature 1."""
    torch.manual_seed(seed)
    ids = torch.from_numpy(prompt).long()[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=end,
        pad_token_id=end,
    )
    return out[0, len(prompt) :]


def log_probs(model: Any, prompt: IntArray, completion: Tensor) -> Tensor:
    """Log-probs over the vocabulary at every loss token: [T - SKIP, V]."""
    ids = torch.cat([torch.from_numpy(prompt).long(), completion])[None]
    return torch.log_softmax(model(ids).logits[0, len(prompt) + SKIP - 1 : -1], -1)


def cut(log_p: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """Cut log-probs to the tokens `ids`: with a bucket for the rest (tail), or renormalized."""
    kept = log_p.gather(-1, ids)
    return with_tail(kept, log_p.shape[-1]) if tail else torch.log_softmax(kept, -1)


def main() -> None:
    prepared = prepare(load_config(EXAMPLE), EXAMPLE)
    model = AutoModelForCausalLM.from_pretrained(prepared.model, dtype=torch.float32)
    parameters = list(model.parameters())
    cases = [(name, k, tail) for name in LOSSES for k in SUPPORTS for tail in (True, False)]
    gradients: dict[Any, Tensor] = {}
    prompts = prepared.stages[0].prompts
    pairs = prompts[:: max(1, len(prompts) // PROMPTS)][:PROMPTS]
    for seed, pair in enumerate(pairs):
        assert pair.teacher_ids is not None  # every row has a demonstration
        completion = sample(model, pair.student_ids, seed, prepared.stop_ids[0])
        if len(completion) <= SKIP:
            continue
        with torch.no_grad():
            log_q = log_probs(model, pair.teacher_ids, completion)
        top = log_q.topk(max(SUPPORTS), -1).indices
        log_p = log_probs(model, pair.student_ids, completion)
        # One forward serves all cases. The gradient with respect to the logits is small; each case adds one backward.
        for case in [*((name, None, True) for name in LOSSES), *cases]:
            name, k, tail = case
            config = LOSSES[name]
            if k is None:
                value = divergence(log_p, log_q, config)
            else:
                value = divergence(cut(log_p, top[:, :k], tail), cut(log_q, top[:, :k], tail), config)
            grads = torch.autograd.grad(value.mean(), parameters, retain_graph=True)
            flat = torch.cat([g.flatten()[::STRIDE] for g in grads])
            gradients[case] = gradients[case].add_(flat) if case in gradients else flat
    rows = []
    for name, k, tail in cases:
        full, g = gradients[name, None, True], gradients[name, k, tail]
        cosine = float(torch.dot(g, full) / (g.norm() * full.norm()))
        difference = float((g - full).norm() / full.norm())
        rows.append({"KL": name, "K": k, "tail": tail, "cosine": cosine, "difference": difference})
    report("gradient", f"Gradient on the teacher's top K against the whole vocabulary, {len(pairs)} rollouts", rows)
    plot(rows, Path(__file__).with_name("gradient.svg"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the relative difference over K, one line for each KL direction with and without the tail."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "sdft"  # equal results give an identical file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    colours = {"forward": "#0072b2", "reverse": "#d55e00"}
    for name, colour in colours.items():
        for tail, style in ((True, "-"), (False, ":")):
            mine = [r for r in rows if r["KL"] == name and r["tail"] == tail]
            label = f"{name} KL, {'tail bucket' if tail else 'no tail'}"
            axes.plot(
                [r["K"] for r in mine], [r["difference"] for r in mine], style, marker="o", color=colour, label=label
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SUPPORTS, [str(k) for k in SUPPORTS])
    axes.set_xlabel("K, the teacher's tokens kept at each position")
    axes.set_ylabel("|g_K - g| / |g|")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
