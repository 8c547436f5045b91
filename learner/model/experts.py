"""The routers of a mixture of experts, which choose the experts of a token.

frozen     they stay as they are unless learner.train_router is set: a router that moves changes which experts are
           trained, and the choices of engine and learner drift apart
replayed   the learner takes the choices of the engine that sampled (learner.replay_experts): in bfloat16 rounding
           sends a token to another expert here than there now and then, and the gradient would be of another model
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TOP_K = (torch.topk, Tensor.topk)


def named_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the routers of a model with their names: by their class, or by their name beside experts."""
    for name, module in model.named_modules():
        above, _, last = name.rpartition(".")
        beside = last in ("router", "gate") and hasattr(model.get_submodule(above), "experts")
        if beside or "Router" in type(module).__name__:
            yield name, module


def replayable(model: nn.Module) -> list[nn.Module]:
    """The routers that choose the top k experts in their own forward. transformers names their classes so."""
    return [router for _, router in named_routers(model) if "Router" in type(router).__name__]


def freeze_routers(model: nn.Module) -> None:
    """Train no router."""
    for _, router in named_routers(model):
        router.requires_grad_(False)


class Replay:
    """Makes the routers of a model choose given experts. The weights of the experts are the router's own for these."""

    def __init__(self, model: nn.Module) -> None:
        """Replace the forward of each router. Raises ValueError if the model has none."""
        self.chosen: Tensor | None = None  # [T, routers, k] int64, -1 where the router chooses; stays until the next
        self.routers = replayable(model)
        if not self.routers:
            raise ValueError("the model has no routers whose choices can be replayed")
        for layer, router in enumerate(self.routers):
            self._replace(router, layer)

    def _replace(self, router: nn.Module, layer: int) -> None:
        own = router.forward

        def forward(*given: Any, **named: Any) -> Any:
            # Gradient checkpointing calls it again in the backward.
            if self.chosen is None:
                return own(*given, **named)
            with _Chosen(self.chosen[:, layer]):
                return own(*given, **named)

        router.forward = forward


class _Chosen(TorchFunctionMode):
    """Inside the block, the top k over the experts of each token are the chosen ones.

    A router with groups of experts takes the top k of groups first, which has another shape or k.
    """

    def __init__(self, chosen: Tensor) -> None:
        super().__init__()
        self._chosen = chosen  # [T, k]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in TOP_K or result.indices.shape != self._chosen.shape:
            return result
        indices = torch.where(self._chosen < 0, result.indices, self._chosen)
        return type(result)((args[0].gather(-1, indices), indices))
