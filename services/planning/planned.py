"""The plan of a run on its GPUs, with gradient checkpointing as the plan chooses it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sdft.services.config.run import RunConfig
from sdft.services.planning.cards import card_gib
from sdft.services.planning.gpu_fit import crowded
from sdft.services.planning.plan import Plan, make_plan
from sdft.services.planning.shape import ModelShape


def planned(
    config: RunConfig, shape: ModelShape, longest: Sequence[int], teachers: Mapping[str, ModelShape]
) -> tuple[RunConfig, Plan]:
    """Return the configuration with learner.gradient_checkpointing, and the plan of it. Arguments: make_plan.

    If the setting is null, it becomes true where a rank of the learner is on a GPU that is too small without, and
    otherwise false.
    """
    card = card_gib(config)
    if config.learner.gradient_checkpointing is not None:
        return config, make_plan(config, shape, longest, teachers, card)
    without, recomputing = (
        config.model_copy(update={"learner": config.learner.model_copy(update={"gradient_checkpointing": chosen})})
        for chosen in (False, True)
    )
    plan = make_plan(without, shape, longest, teachers, card)
    if not any(part.pool is None for parts in crowded(plan) for part in parts):
        return without, plan
    return recomputing, replace(make_plan(recomputing, shape, longest, teachers, card), chosen=True)
