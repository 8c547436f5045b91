"""What is trained on and by: the same engine, schedule, ledger and checkpoints for each method.

sdft   the student's own samples, pulled to the teacher by loss.divergence
sft    the demonstrations' tokens, by their negative log-likelihood
dft    the same with each token weighted by the student's own probability of it, without gradient through that
       weight (Wu et al. 2025, "On the Generalization of SFT", arXiv 2508.05629)
"""

from learner.config import LossConfig, TeacherConfig, TokenLoss
from services.config import RunConfig

TOKEN_LOSSES = {"sft": TokenLoss(divergence="nll"), "dft": TokenLoss(divergence="dft")}


def on_policy(config: RunConfig) -> bool:
    """Whether the student samples what it is trained on."""
    return config.method not in TOKEN_LOSSES


def loss_of(config: RunConfig) -> LossConfig:
    """The learner's loss."""
    return TOKEN_LOSSES.get(config.method, config.loss)


def teacher_of(config: RunConfig) -> TeacherConfig:
    """The learner's teacher; none is kept where nothing is scored."""
    return config.teacher if on_policy(config) else TeacherConfig(weights="live")
