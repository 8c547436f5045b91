"""Settings of a learner rank and the result of a step. Does not import torch, so the controller can import it."""

from dataclasses import dataclass, field

from sdft.learner.completions import CompletionCounts, Watched
from sdft.learner.config import LearnerConfig, LossConfig, OptimizerConfig, TeacherConfig


@dataclass(frozen=True)
class StageSettings:
    """The learner's settings of one stage of the run."""

    before: int  # optimizer steps of the stages before it
    steps: int | None  # None: the end of the stage is open, and the learning rate is constant
    losses: tuple[LossConfig, ...]  # a sequence's `objective` is the index
    optimizer: OptimizerConfig
    keep_moments: bool = False
    watched: Watched = field(default_factory=Watched)  # looked for in completions


@dataclass(frozen=True)
class LearnerSettings:
    """The settings that a rank is started with; the same on every rank except `rank`."""

    model: str  # local folder
    dtype: str
    device: str
    seed: int
    config: LearnerConfig
    stages: tuple[StageSettings, ...]
    teacher: TeacherConfig
    rank: int = 0
    exclusive: bool = False  # no other process of the run computes while this one does
    transport: str = "memory"  # weights.transport
    vocabulary: int | None = None  # tokens of the tokenizer; later rows are in no distribution. None: all rows are
    frees_memory: bool = False  # give back what torch has cached of a GPU after each step, for engines that sleep in it
    replay_experts: bool = False  # route tokens to the experts that the sampler chose

    def stage_of(self, step: int) -> int:
        """Return the index of the stage that optimizer step `step` is in. Steps after the last stage belong to it."""
        return max(i for i, stage in enumerate(self.stages) if i == 0 or step > stage.before)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, over all ranks."""

    loss: float  # the value that is differentiated
    divergence: float  # of teacher and student: without importance weights and clip
    mismatch_kl: float  # mean over loss tokens that the student sampled, k3 estimate of KL(sampler || trainer)
    tail_mass: float  # mean over loss tokens of the teacher's mass outside the support
    grad_norm: float  # before clipping; if it is not finite, see applied
    lr: float
    loss_tokens: int
    applied: bool = True  # False: the gradient is not finite, and no weight changed
    completions: CompletionCounts = field(default_factory=CompletionCounts)
    clipped: float | None = None  # share of loss tokens whose divergence is clipped; None: no loss clips
    loss_entropy: float | None = None  # mean over loss tokens of the student's, in nats; None: no loss has it
