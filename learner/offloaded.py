"""AdamWWithTeacher with its state in the host's memory: it passes through the device chunk by chunk.

    host      moments, teacher │ a chunk of each ─►                   ─► back into its place │ the next chunk ...
    device    parameter, gradient, and the chunk:     AdamW, average

A step computes on the device what AdamWWithTeacher computes there, so it has the same bits. It saves 12 bytes a
parameter there, and copies as many to the device and back.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.adamw import adamw

from sdft.learner.config import OFFLOAD_CHUNK
from sdft.learner.optimizer import TEACHER, AdamWWithTeacher

State = dict[str, torch.Tensor]
Update = Callable[[torch.Tensor, torch.Tensor, State, dict[str, Any]], None]  # of a chunk of a parameter


class OffloadedAdamW(AdamWWithTeacher):
    """AdamWWithTeacher for parameters on any device, whose state is in the host's memory, pinned for a GPU."""

    chunk = OFFLOAD_CHUNK

    def _empty(self, p: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(p, device="cpu", pin_memory=p.is_cuda)

    def _update(self, one_pass: bool) -> None:
        for p, group in self._stepped():
            step = self.state[p]["step"]
            # The number is read once a parameter: to read it from a GPU waits for all copies before.
            update = partial(self._adamw, step=int(step) + 1) if one_pass else partial(self._plain, step=step)
            self._update_one(p.view(-1), p.grad.view(-1), self.state[p], group, update)

    def _update_one(
        self, p: torch.Tensor, gradient: torch.Tensor, state: State, group: dict[str, Any], update: Update
    ) -> None:
        keys = [key for key in ("exp_avg", "exp_avg_sq", TEACHER) if key != TEACHER or self.alpha]
        for first in range(0, len(p), self.chunk):
            place = slice(first, first + self.chunk)
            host = {key: state[key].view(-1)[place] for key in keys}
            here = {key: value.to(p.device, non_blocking=True, copy=True) for key, value in host.items()}
            update(p[place], gradient[place], here, group)
            for key, value in here.items():
                host[key].copy_(value, non_blocking=True)
        state["step"] += 1
        if p.is_cuda:
            torch.cuda.synchronize(p.device)  # the copies to the host end before the state is read there

    def _plain(
        self, p: torch.Tensor, gradient: torch.Tensor, here: State, group: dict[str, Any], step: torch.Tensor
    ) -> None:
        adamw(
            [p],
            [gradient],
            [here["exp_avg"]],
            [here["exp_avg_sq"]],
            [],
            [step.clone()],  # which adamw counts up
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if self.alpha:
            here[TEACHER].lerp_(p, self.alpha)
