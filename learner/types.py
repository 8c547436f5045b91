"""What goes into a learner rank and what a step gives back; no torch, so the controller may import it."""

from dataclasses import dataclass

from sdft.learner.config import LearnerConfig, LossConfig, OptimizerConfig, TeacherConfig


@dataclass(frozen=True)
class StageSettings:
    """One stage of the run, as the learner knows it."""

    before: int  # optimizer steps of the stages before it
    steps: int
    loss: LossConfig
    optimizer: OptimizerConfig
    keep_moments: bool = False


@dataclass(frozen=True)
class LearnerSettings:
    """What one rank is started with; the same on every rank but for `rank`."""

    model: str  # local folder
    dtype: str
    device: str
    seed: int
    config: LearnerConfig
    stages: tuple[StageSettings, ...]
    teacher: TeacherConfig
    rank: int = 0
    alone: bool = False  # nobody else of the run computes while it does

    def stage_of(self, step: int) -> int:
        """Which stage optimizer step `step` is in; what comes after the last is in the last."""
        return max(i for i, stage in enumerate(self.stages) if i == 0 or step > stage.before)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    loss: float  # what was differentiated
    divergence: float  # the same without importance weights
    mismatch_kl: float  # mean over loss tokens, k3 estimate of KL(sampler || trainer)
    tail_mass: float  # mean over loss tokens of the teacher's mass outside its top K
    grad_norm: float  # before clipping; not finite: see applied
    lr: float
    loss_tokens: int
    applied: bool = True  # False: the gradient was not finite, and no weight was changed
