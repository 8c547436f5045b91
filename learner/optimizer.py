"""AdamW that carries the EMA teacher in its own state.

DeepSpeed hands an optimizer its fp32 master partition, whatever the ZeRO stage. Keeping the teacher beside Adam's
moments makes its update local (no communication, 4 bytes per parameter divided by the ranks) and puts it into every
checkpoint that holds the moments.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sdft.learner.config import OptimizerConfig, TeacherConfig

MASTER = "master"  # the parameter itself among the tensors of the training state
TEACHER = "teacher"  # key of the EMA in a parameter's optimizer state


class AdamWWithTeacher(torch.optim.AdamW):
    """torch's AdamW; after every step teacher <- alpha * parameter + (1 - alpha) * teacher, in the master's precision.

    alpha None: no teacher is kept (live weights). alpha 0: it stays as it began, at no cost per step.
    """

    def __init__(self, params: Iterable[Any], alpha: float | None, clip: float | None = None) -> None:
        """clip: the gradient's norm is cut to it, and a step whose gradient is not finite is not taken; None: somebody
        else sees to both."""
        # lr 0 until the stage's settings speak: an optimizer step of DeepSpeed's own set-up must not move a weight.
        super().__init__(params, lr=0.0, weight_decay=0.0, fused=True)
        self.alpha = alpha
        self.clip = clip
        self.norm = 0.0  # of the last gradient before it was clipped, where that is done here

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.clip is not None:
            self.norm = float(torch.nn.utils.clip_grad_norm_(params, self.clip))
            if not math.isfinite(self.norm):
                return None
        for p in params:
            self.begin(p)
        result = super().step(closure)
        if self.alpha:
            for p in params:
                self.state[p][TEACHER].lerp_(p, self.alpha)
        return result

    @property
    def keys(self) -> tuple[str, ...]:
        """What the training state holds of every parameter."""
        return (MASTER, "exp_avg", "exp_avg_sq", *(() if self.alpha is None else (TEACHER,)))

    def begin(self, p: torch.Tensor) -> None:
        """Give a parameter its state, unless it has one: AdamW's, which takes any state for its own, and the EMA."""
        if not self.state[p]:
            p0 = p.detach()
            steps = torch.zeros((), device=p.device)  # where the fused kernel of a GPU wants it
            self.state[p].update(step=steps, exp_avg=torch.zeros_like(p0), exp_avg_sq=torch.zeros_like(p0))
        if self.alpha is not None and TEACHER not in self.state[p]:
            self.state[p][TEACHER] = p.detach().clone()

    @torch.no_grad()
    def begin_stage(self, params: Iterable[torch.Tensor], teacher: bool, moments: bool) -> None:
        """Of parameters that have a state: `teacher` makes the EMA the parameter, `moments` keeps what AdamW has."""
        for p in params:
            state = self.state.get(p)
            if not state:
                continue
            if teacher and TEACHER in state:
                state[TEACHER].copy_(p)
            if not moments:
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
        if not moments:
            self.set_steps(0)

    @property
    def steps(self) -> int:
        """How many steps AdamW's bias correction counts."""
        return next((int(state["step"]) for state in self.state.values() if state), 0)

    def set_steps(self, steps: int) -> None:
        for state in self.state.values():
            state["step"].fill_(float(steps))


def teacher_alpha(teacher: TeacherConfig) -> float | None:
    """The alpha of AdamWWithTeacher for a kind of teacher weights."""
    return {"ema": teacher.alpha, "frozen": 0.0, "base": 0.0, "live": None}[teacher.weights]


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` (1-based): linear warm-up, then constant or cosine to zero at the end.

    A pure function of the step: there is no scheduler state to lose.
    """
    warmup = min(config.warmup_steps, max(0, total_steps - 1))
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup - 1) / max(1, total_steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
