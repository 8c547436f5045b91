"""Whether the learner routes tokens to the experts that the sampler chose (learner.replay_experts)."""

from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig


def replays_experts(config: RunConfig, routed: bool, carries: bool) -> bool:
    """Decide it for a run. routed: the model has experts, and the learner can replay their choice.

    carries: layers of it carry a state along the sequence. On a GPU vLLM keeps the experts in the prefix cache, which
    such a model does not have here.

    UserError if it is asked for and cannot be done.
    """
    wanted = config.learner.replay_experts
    if wanted and not routed:
        raise UserError(
            "learner.replay_experts is true, and the model has no experts whose choice the learner can replay; remove "
            "the key"
        )
    if wanted and config.device != "cpu" and carries:
        raise UserError(
            "learner.replay_experts is true, and engines on GPUs do not report the experts of a model with "
            "convolutions, delta nets or state spaces; remove the key"
        )
    # In float32 engine and learner choose the same experts.
    usual = routed and config.device == "cpu" and config.dtype == "bfloat16"
    return usual if wanted is None else wanted
