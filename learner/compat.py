"""What the learner uses of DeepSpeed that is not documented. Known for the version below.

Each function names what it uses, and gets DeepSpeed's objects from engine.py, the one module that imports it.
tests/learner/test_compat.py has one line for each name and fails without it.
"""

from typing import Any

import torch
from torch import Tensor, nn

DEEPSPEED = "0.19.8"


def build_nothing(deepspeed: Any) -> None:
    """Keep DeepSpeed (the package) from building its shared-memory reduction at start, which needs a C++ compiler.

    Torch guards such a build by a lock file in the user's cache. A killed process leaves the file behind, and torch
    waits for its removal without a limit, so every later learner of this user would hang. Gloo reduces instead.
    Changes deepspeed.ops.__compatible_ops__.
    """
    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def reduce_nothing(engine: Any) -> None:
    """Leave out the reduction of gradients over the ranks. Sets the engine's enable_backward_allreduce.

    Raises ValueError if there are other ranks, which would then step apart.
    """
    ranks = torch.distributed.get_world_size()
    if ranks > 1:
        raise ValueError(f"the gradients of {ranks} ranks must be reduced")
    engine.enable_backward_allreduce = False


def link_state(optimizer: Any) -> None:
    """Link parameters to their optimizer state, which DeepSpeed itself does only at the first step.

    Uses _lazy_init_hp_params_optimizer_state of the optimizers of ZeRO stages 1 and 2.
    """
    optimizer._lazy_init_hp_params_optimizer_state()


def divided_masters(optimizer: Any) -> list[Tensor]:
    """This rank's float32 weights at ZeRO stage 3, flat. Uses the optimizer's fp32_partitioned_groups_flat.

    The documented safe_get_local_fp32_param returns parts of them, and the optimizer keeps its state by these.
    """
    parts: list[Tensor] = optimizer.fp32_partitioned_groups_flat
    return parts


def fragment(param: nn.Parameter, state: str | None) -> tuple[int, Tensor] | None:
    """This rank's part of a parameter's flat master (None) or optimizer state at ZeRO stages 1 and 2, and its offset.

    Returns None if the rank has no part of it. Uses Parameter._hp_mapping: lp_fragment_address and get_hp_fragment. The
    documented safe_get_local_* are for ZeRO stage 3 only, and safe_get_full_* allocate the whole and reduce it.
    """
    mapping = param._hp_mapping
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(state).detach()


def numel(param: nn.Parameter) -> int:
    """The number of elements of the whole parameter, of which a rank holds only a part at ZeRO stage 3.

    Uses Parameter.ds_numel, which parameters have at ZeRO stage 3 only.
    """
    return getattr(param, "ds_numel", param.numel())
