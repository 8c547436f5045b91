"""What is trained on and by: the same engine, schedule, ledger and checkpoints for each method.

- sdft: the student's own samples, pulled to the teacher by loss.divergence
- off_policy: the same on samples of the teacher, drawn with the demonstration in the prompt
- sft: the demonstrations' tokens, by their negative log-likelihood
- dft: the same with each token weighted by the student's own probability of it, without gradient through that weight
  (Wu et al. 2025, "On the Generalization of SFT", arXiv 2508.05629)
"""

from sdft.learner.config import ImportanceConfig, LossConfig, TeacherConfig, TokenLoss
from sdft.services.config.run import RunConfig, TaskConfig

TOKEN_LOSSES = {"sft": TokenLoss(divergence="nll"), "dft": TokenLoss(divergence="dft")}


def on_policy(config: TaskConfig) -> bool:
    """Whether the student samples what it is trained on."""
    return config.method == "sdft"


def on_demonstrations(config: TaskConfig) -> bool:
    """Whether nobody samples, and nobody scores."""
    return config.method in TOKEN_LOSSES


def loss_of(config: TaskConfig) -> LossConfig:
    """The learner's loss. Importance weights correct for what the student sampled otherwise, and nothing else."""
    if config.method == "off_policy":
        return config.loss.model_copy(update={"importance": ImportanceConfig(level="off")})
    return TOKEN_LOSSES.get(config.method, config.loss)


def teacher_of(config: RunConfig) -> TeacherConfig:
    """The learner's teacher; none is kept where no stage is scored."""
    return TeacherConfig(weights="live") if all(map(on_demonstrations, config.tasks)) else config.teacher
