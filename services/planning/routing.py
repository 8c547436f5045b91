"""Whether the learner routes tokens to the experts that the sampler chose (learner.replay_experts)."""

from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig


def replays_experts(config: RunConfig, routed: bool, carries: bool) -> bool:
    """Decide it for a run. routed: the model has experts, and the learner can replay their choice.

    carries: layers of it carry a state along the sequence. On a GPU vLLM keeps the experts in the prefix cache, which
    such a model does not have here.

    UserError if it is asked for and cannot be done.
    """
    wanted, parts = config.learner.replay_experts, config.actors.student.tensor_parallel
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
    if wanted and parts > 1:
        raise UserError(
            f"learner.replay_experts is true, and actors.student.tensor_parallel is {parts}: the experts of an engine "
            f"that is split are not reported; remove the key, or set tensor_parallel: 1"
        )
    # In float32 engine and learner choose the same experts.
    usual = routed and config.device == "cpu" and config.dtype == "bfloat16" and parts == 1
    return usual if wanted is None else wanted
