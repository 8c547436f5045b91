"""The undocumented names in learner/compat.py: each is in the installed DeepSpeed."""

import pytest

from sdft.learner import compat
from tests.canary import Canary, Library, mentions, named, takes

DEEPSPEED = Library("DeepSpeed", compat.DEEPSPEED, "learner/compat.py", ("deepspeed",))
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
FRAGMENT = "deepspeed.utils.tensor_fragment:tensor_fragment"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
LINK = "_lazy_init_hp_params_optimizer_state"

CANARIES: dict[str, Canary] = {
    "DeepSpeedEngine.enable_backward_allreduce": lambda: mentions(f"{ENGINE}.__init__", "enable_backward_allreduce"),
    "a backward that reads enable_backward_allreduce": lambda: mentions(
        f"{ENGINE}._backward_epilogue", "enable_backward_allreduce", "allreduce_gradients"
    ),
    "deepspeed.ops.__compatible_ops__": lambda: mentions("deepspeed.ops:__getattr__", "__compatible_ops__"),
    "a build of ShareMemCommBuilder only if __compatible_ops__ has it": lambda: mentions(
        "deepspeed.comm.torch:build_shm_op", "ShareMemCommBuilder", "__compatible_ops__", "NAME"
    ),
    f"{LINK} at ZeRO stages 1 and 2": lambda: named(
        f"deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.{LINK}"
    ),
    f"{LINK} in bfloat16 at ZeRO stage 1": lambda: named(f"deepspeed.runtime.bf16_optimizer:BF16_Optimizer.{LINK}"),
    "fp32_partitioned_groups_flat at ZeRO stage 3": lambda: mentions(
        f"{STAGE_3}.__init__", "fp32_partitioned_groups_flat"
    ),
    "Parameter._hp_mapping": lambda: mentions("deepspeed.utils.mixed_precision_linkage:link_hp_params", "_hp_mapping"),
    "Parameter._hp_mapping.lp_fragment_address": lambda: "lp_fragment_address" in named(f"{FRAGMENT}.__annotations__"),
    "the start of an lp_fragment_address": lambda: (
        "start" in named("deepspeed.utils.tensor_fragment:fragment_address.__annotations__")
    ),
    "Parameter._hp_mapping.get_hp_fragment(optim_state_key)": lambda: takes(
        f"{FRAGMENT}.get_hp_fragment", "optim_state_key"
    ),
    "Parameter.ds_numel": lambda: mentions(
        "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param", "ds_numel"
    ),
}


def test_the_installed_version_is_the_known_one() -> None:
    DEEPSPEED.check_version()


@pytest.mark.parametrize("name", CANARIES)
def test_deepspeed_has_the_name(name: str) -> None:
    DEEPSPEED.check(name, CANARIES[name])


def test_gradients_of_several_ranks_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="the gradients of 2 ranks must be reduced"):
        compat.reduce_nothing(object())
