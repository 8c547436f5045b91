"""Compute the last layer's feed-forward network only for the tokens whose hidden states are read.

After the last attention no token affects another, so the results of the other tokens are not used. Where completions
are a quarter of the tokens, those results are 2 % of the work of a model of 30 layers, and more of a shorter one.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

GATED = ("gate_proj", "up_proj", "down_proj")  # a network of these layers treats every token independently


def only_where_read(model: PreTrainedModel) -> bool:
    """Make the last feed-forward network compute only the rows `read` [N] int64, an argument of the forward.

    If `read` is None it computes all rows. It adds nothing to the hidden states of rows that are not computed. Returns
    whether the model has such a network.
    """
    last = (getattr(model.base_model, "layers", None) or [None])[-1]
    network = getattr(last, "mlp", None)
    if last is None or network is None or not all(hasattr(network, name) for name in GATED):
        return False
    whole, read = network.forward, None

    def note(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        # Also called when gradient checkpointing recomputes the layer.
        nonlocal read
        read = given.get("read")

    def some(states: Tensor) -> Tensor:
        if read is None:
            return whole(states)
        return states.new_zeros(states.shape).index_copy_(1, read, whole(states.index_select(1, read)))

    last.register_forward_pre_hook(note, with_kwargs=True)
    network.forward = some
    return True
