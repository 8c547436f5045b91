"""SDFT in one process with plain transformers and torch: one sequence at a time, every formula written out.

The reference for the learner, with which it shares no code.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sdft.actors.shared.sequences import TrainingSequence


class Reference:
    """Student and EMA teacher, trained on given rollouts with the forward KL on top-K + tail."""

    def __init__(self, path: Path, alpha: float, cap: float, clip: float, **adamw: Any) -> None:
        """adamw: the settings of AdamW, without the learning rate."""
        self.student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.teacher = {n: p.clone() for n, p in self.weights().items()}
        self.alpha, self.cap, self.clip = alpha, cap, clip
        self.figures: dict[str, float] = {}  # of the last step; grad_norm is the norm before clipping
        self.adamw = adamw
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.0, **adamw)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the student's weights by their Hugging Face names."""
        return {n: p.detach() for n, p in self.student.named_parameters()}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.student(ids).logits

    def sequence_loss(self, sample: TrainingSequence) -> tuple[torch.Tensor, ...]:
        """Return (w, divergence, k3 [T], q_tail [T]) of one sample, over its T loss tokens.

        w is the mean of min(r, cap) with r = p / p_sampler of the token itself. The divergence is the mean of sum_k q_k
        log(q_k / p_k) + q_tail log(q_tail / p_tail). k3 is r - 1 - log r.
        """
        ids = torch.tensor(sample.token_ids).long()
        rows = torch.tensor(sample.loss_mask).nonzero()[:, 0]
        if not len(rows) or sample.teacher is None:
            return torch.ones(()), torch.zeros(()), torch.zeros(0), torch.zeros(0)
        log_p = torch.log_softmax(self.logits(ids[None])[0], -1)[rows - 1]
        completion, ids = ids[rows], torch.tensor(sample.teacher.ids).long()
        log_q = torch.tensor(sample.teacher.logprobs)
        own = log_p.gather(1, completion[:, None])[:, 0].detach()
        ratio = torch.exp(own - torch.tensor(sample.logprobs)[rows])
        weight = ratio.clamp(max=self.cap).mean()
        total, tails = torch.zeros(()), []
        for t in range(len(completion)):
            p = log_p[t, ids[t]].exp()
            q = log_q[t].exp()
            p_tail, q_tail = 1 - p.sum(), 1 - q.sum()
            total = total + (q * (q.log() - p.log())).sum() + q_tail * (q_tail.log() - p_tail.log())
            tails.append(q_tail)
        return weight, total / len(completion), ratio - 1 - ratio.log(), torch.stack(tails)

    def begin_stage(self, betas: tuple[float, float], keep_moments: bool = False) -> None:
        """Set the teacher to the student, and reset AdamW's moments unless keep_moments."""
        self.teacher = {n: p.clone() for n, p in self.weights().items()}
        (group,) = self.optimizer.param_groups
        group["betas"] = betas
        if not keep_moments:
            self.optimizer = torch.optim.AdamW(group["params"], lr=0.0, betas=betas, **self.adamw)

    def step(self, samples: Sequence[TrainingSequence], lr: float) -> float:
        """Take one optimizer step; return the loss."""
        weights, divergences, k3, tails = zip(*map(self.sequence_loss, samples), strict=True)
        loss = (torch.stack(weights) * torch.stack(divergences)).mean()
        loss.backward()
        (group,) = self.optimizer.param_groups
        group["lr"] = lr
        self.figures = {
            "divergence": torch.stack(divergences).mean().item(),
            "mismatch_kl": torch.cat(k3).mean().item(),
            "tail_mass": torch.cat(tails).mean().item(),
            "grad_norm": float(torch.nn.utils.clip_grad_norm_(group["params"], self.clip)),
        }
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, p in self.weights().items():
            self.teacher[name] = self.alpha * p + (1 - self.alpha) * self.teacher[name]
        return loss.item()


class LoraReference(Reference):
    """A reference that adds `scale * B A` to some weights and trains only A and B.

    adapters: "NAME.lora_A.weight" [rank, in] and "NAME.lora_B.weight" [out, rank] for each weight "NAME.weight".
    """

    def __init__(
        self, path: Path, adapters: dict[str, torch.Tensor], scale: float, alpha: float, clip: float, **adamw: Any
    ) -> None:
        super().__init__(path, alpha, cap=2.0, clip=clip, **adamw)
        self.student.requires_grad_(False)
        self.base, self.scale = {n: p.clone() for n, p in self.weights().items()}, scale
        self.adapters = {name: tensor.clone().requires_grad_() for name, tensor in adapters.items()}
        self.optimizer = torch.optim.AdamW(self.adapters.values(), lr=0.0, **adamw)

    def merged(self) -> dict[str, torch.Tensor]:
        """Return every weight with its adapter added, differentiable in the adapters."""
        weights = dict(self.base)
        for name in {n.rsplit(".lora_", 1)[0] for n in self.adapters}:
            change = self.adapters[f"{name}.lora_B.weight"] @ self.adapters[f"{name}.lora_A.weight"]
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + self.scale * change
        return weights

    def weights(self) -> dict[str, torch.Tensor]:
        if not hasattr(self, "adapters"):
            return super().weights()
        return {n: p.detach() for n, p in self.merged().items()}

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.student, self.merged(), (ids,)).logits
