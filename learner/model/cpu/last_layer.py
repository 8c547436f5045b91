"""The last layer's feed-forward network, computed only for the tokens whose hidden states are read.

After the last attention no token reaches another any more, so whatever is computed for the others is computed for
nobody. Where completions are a quarter of the tokens that is 2 % of a model of 30 layers, and more of a shorter one.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

GATED = ("gate_proj", "up_proj", "down_proj")  # a network of these treats every token by itself


def only_where_read(model: PreTrainedModel) -> bool:
    """Have the last feed-forward network compute the rows that the forward is given as `read` [N] int64, all if None.

    In its other rows it adds nothing to the hidden states. Returns whether the model has such a network.
    """
    last = (getattr(model.base_model, "layers", None) or [None])[-1]
    network = getattr(last, "mlp", None)
    if last is None or network is None or not all(hasattr(network, name) for name in GATED):
        return False
    whole, read = network.forward, None

    def note(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        # Called once more where the layer is computed again for its gradient.
        nonlocal read
        read = given.get("read")

    def some(states: Tensor) -> Tensor:
        if read is None:
            return whole(states)
        return states.new_zeros(states.shape).index_copy_(1, read, whole(states.index_select(1, read)))

    last.register_forward_pre_hook(note, with_kwargs=True)
    network.forward = some
    return True
