"""AdamW that keeps the EMA teacher in its own state.

DeepSpeed gives an optimizer its fp32 master partition at every ZeRO stage. Keeping the teacher beside Adam's moments
makes its update local (no communication, 4 bytes per parameter divided by the ranks) and puts it into every checkpoint
that holds the moments.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from sdft.learner.config import OptimizerConfig, TeacherConfig
from sdft.learner.gpu.adamw import adamw

MASTER = "master"  # key of the parameter itself in the training state
TEACHER = "teacher"  # key of the EMA in a parameter's optimizer state


class AdamWWithTeacher(torch.optim.AdamW):
    """torch's AdamW; after every step teacher <- alpha * parameter + (1 - alpha) * teacher, in the master's precision.

    alpha None: no teacher is kept (live weights). alpha 0: the teacher keeps its first value, at no cost per step.
    """

    def __init__(
        self, params: Iterable[Any], alpha: float | None, clip: float | None = None, in_one_pass: bool = False
    ) -> None:
        """clip: largest norm of the gradient; a step whose gradient is not finite is skipped. None: neither is done
        here, because DeepSpeed does both. in_one_pass: update each parameter and its teacher by one fused kernel."""
        # lr is 0 until the stage's settings replace it: a step in DeepSpeed's set-up must not change a weight.
        super().__init__(params, lr=0.0, weight_decay=0.0, fused=True)
        self.alpha = alpha
        self.clip = clip
        self.in_one_pass = in_one_pass
        self.norm = 0.0  # of the last gradient before clipping; only if `clip` is given

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        params = self._with_gradient()
        if self.clip is not None:
            self.norm = float(torch.nn.utils.clip_grad_norm_(params, self.clip))
            if not math.isfinite(self.norm):
                return
        for p in params:
            self.begin(p)
        self._update(self.in_one_pass and all(map(_suits, params)))

    def _update(self, one_pass: bool) -> None:
        """Update the parameters that have a gradient, their moments and the teacher. one_pass: by the fused kernel."""
        if one_pass:
            for p, group in self._stepped():
                self._adamw(p, p.grad, self.state[p], group, int(self.state[p]["step"]) + 1)
                self.state[p]["step"] += 1
            return
        super().step()
        if self.alpha:
            for p in self._with_gradient():
                self.state[p][TEACHER].lerp_(p, self.alpha)

    def _adamw(
        self,
        p: torch.Tensor,
        gradient: torch.Tensor,
        state: Mapping[str, torch.Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> None:
        """Update a parameter and its state by the fused kernel. step: of the parameter, counted from 1."""
        teacher = state[TEACHER] if self.alpha else None
        moments, betas = (state["exp_avg"], state["exp_avg_sq"]), group["betas"]
        eps, decay = group["eps"], group["weight_decay"]
        adamw(p, gradient, *moments, teacher, step, group["lr"], *betas, eps, decay, self.alpha or 0.0)

    def _stepped(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Yield the parameters that have a gradient, each with its settings."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield p, group

    def _with_gradient(self) -> list[torch.Tensor]:
        return [p for p, _ in self._stepped()]

    def _empty(self, p: torch.Tensor) -> torch.Tensor:
        """Return memory for a state of `p`, in its shape and dtype."""
        return torch.empty_like(p)

    @property
    def keys(self) -> tuple[str, ...]:
        """The kinds of tensors that the training state holds for every parameter."""
        return (MASTER, "exp_avg", "exp_avg_sq", *(() if self.alpha is None else (TEACHER,)))

    def begin(self, p: torch.Tensor) -> None:
        """Create a parameter's state unless it has one: AdamW's and the EMA.

        AdamW creates its own state only for a parameter without any, so with the EMA alone it would create none.
        """
        if not self.state[p]:
            steps = torch.zeros((), device=p.device)  # the fused kernel needs it on the parameter's device
            moments = {key: self._empty(p.detach()).zero_() for key in ("exp_avg", "exp_avg_sq")}
            self.state[p].update(step=steps, **moments)
        if self.alpha is not None and TEACHER not in self.state[p]:
            self.state[p][TEACHER] = self._empty(p.detach()).copy_(p.detach())

    @torch.no_grad()
    def refresh_teacher(self, params: Iterable[torch.Tensor]) -> None:
        """Set the EMA of parameters that have one to the parameter."""
        for p in params:
            if TEACHER in (state := self.state.get(p, {})):
                state[TEACHER].copy_(p)

    @torch.no_grad()
    def reset_moments(self, params: Iterable[torch.Tensor]) -> None:
        """Begin AdamW anew: moments and steps are 0."""
        for p in params:
            if state := self.state.get(p):
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
        self.set_steps(0)

    @property
    def steps(self) -> int:
        """The step count of AdamW's bias correction."""
        return next((int(state["step"]) for state in self.state.values() if state), 0)

    def set_steps(self, steps: int) -> None:
        for state in self.state.values():
            state["step"].fill_(float(steps))


def _suits(p: torch.Tensor) -> bool:
    """Whether the fused kernel can update a parameter."""
    assert p.grad is not None
    return p.dtype == p.grad.dtype == torch.float32 and p.is_contiguous() and p.grad.is_contiguous()


def teacher_alpha(teacher: TeacherConfig) -> float | None:
    """Return AdamWWithTeacher's alpha for a kind of teacher weights."""
    return {"ema": teacher.alpha, "gated": 0.0, "frozen": 0.0, "base": 0.0, "live": None}[teacher.weights]


def learning_rate(step: int, total_steps: int | None, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step` (1-based): linear warm-up, then constant or cosine to zero at the end.

    total_steps: None if the end is open, which a cosine does not allow. It is a pure function of the step, so there is
    no scheduler state to save.
    """
    warmup = config.warmup_steps if total_steps is None else min(config.warmup_steps, max(0, total_steps - 1))
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "constant" or total_steps is None:
        return config.lr
    done = (step - warmup - 1) / max(1, total_steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))
