"""Training methods. All use the same engine, schedule, ledger and checkpoints.

- sdft: rollouts of the student, with loss.divergence between teacher and student
- off_policy: the same loss on rollouts of the teacher, sampled with the demonstration in the prompt
- sft: negative log-likelihood of the demonstrations' tokens
- dft: the same with each token weighted by the student's own probability of it, without gradient through that weight
  (Wu et al. 2025, "On the Generalization of SFT", arXiv 2508.05629)
"""

from sdft.learner.config import ImportanceConfig, LossConfig, TeacherConfig, TokenLoss
from sdft.services.config.run import RunConfig, TaskConfig

TOKEN_LOSSES = {"sft": TokenLoss(divergence="nll"), "dft": TokenLoss(divergence="dft")}


def on_policy(config: TaskConfig) -> bool:
    """Return whether the student samples the completions that it is trained on."""
    return config.method == "sdft"


def on_demonstrations(config: TaskConfig) -> bool:
    """Return whether the demonstrations' own tokens are trained on: no engine samples or scores."""
    return config.method in TOKEN_LOSSES


def loss_of(config: TaskConfig) -> LossConfig:
    """Return the learner's loss. Importance weights correct only rollouts of the student, so off_policy has none."""
    if config.method == "off_policy":
        return config.loss.model_copy(update={"importance": ImportanceConfig(level="off")})
    return TOKEN_LOSSES.get(config.method, config.loss)


def teacher_of(config: RunConfig) -> TeacherConfig:
    """Return the learner's teacher settings: live weights, without a copy, if no stage is scored."""
    return TeacherConfig(weights="live") if all(map(on_demonstrations, config.tasks)) else config.teacher
