"""What goes into a learner rank and what a step gives back; no torch, so the controller may import it."""

from dataclasses import dataclass

from learner.config import LearnerConfig, LossConfig, TeacherConfig


@dataclass(frozen=True)
class LearnerSettings:
    """What one rank is started with; the same on every rank but for `rank`."""

    model: str  # local folder
    dtype: str
    device: str
    seed: int
    total_steps: int
    config: LearnerConfig
    loss: LossConfig
    teacher: TeacherConfig
    rank: int = 0


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    loss: float  # what was differentiated
    divergence: float  # the same without importance weights
    mismatch_kl: float  # mean over loss tokens, k3 estimate of KL(sampler || trainer)
    tail_mass: float  # mean over loss tokens of the teacher's mass outside its top K
    grad_norm: float  # before clipping
    lr: float
    loss_tokens: int
