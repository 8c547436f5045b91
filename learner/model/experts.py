"""The routers of a mixture of experts, which choose the experts of a token.

They stay as they are unless learner.train_router is set: a router that moves changes which experts are trained, and the
choices of engine and learner drift apart.
"""

from collections.abc import Iterator

from torch import nn


def named_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the routers of a model with their names. transformers names their classes so."""
    return ((name, module) for name, module in model.named_modules() if "Router" in type(module).__name__)


def freeze_routers(model: nn.Module) -> None:
    """Train no router."""
    for _, router in named_routers(model):
        router.requires_grad_(False)
