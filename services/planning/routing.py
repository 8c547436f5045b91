"""Whether the learner routes tokens to the experts that the sampler chose (learner.replay_experts)."""

from pathlib import Path

from sdft.actors.shared.model_files import read_json
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # keys of config.json for the number of experts


def replays_experts(config: RunConfig, model: Path) -> bool:
    """Decide it for a run. UserError if it is asked for and the model has no experts, or engines do not report them."""
    shape = read_json(model / "config.json")
    routed = any(int(shape.get(key) or 0) > 1 for key in EXPERTS)
    wanted = config.learner.replay_experts
    if wanted and not routed:
        raise UserError(f"learner.replay_experts is true, and the model in {model} has no experts; remove the key")
    if wanted and config.device != "cpu":
        raise UserError(
            "learner.replay_experts is true, and engines on GPUs do not report the experts that they chose; set it to "
            "false"
        )
    # In float32 engine and learner choose the same experts.
    usual = routed and config.device == "cpu" and config.dtype == "bfloat16"
    return usual if wanted is None else wanted
