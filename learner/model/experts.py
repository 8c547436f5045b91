"""The routers of a mixture of experts, which choose the experts of a token.

They stay as they are unless learner.train_router is set: a router that moves changes which experts are trained, and the
choices of engine and learner drift apart.
"""

from collections.abc import Iterator

from torch import nn


def routers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the routers of a model. transformers names their classes so."""
    return (module for module in model.modules() if "Router" in type(module).__name__)


def freeze_routers(model: nn.Module) -> None:
    """Train no router."""
    for router in routers(model):
        router.requires_grad_(False)
