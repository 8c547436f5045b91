"""Layers that carry a state along a sequence, in a pack: they compute its sequences one after the other.

    norms, attention, feed-forward networks, experts, head     the whole pack at once
    convolutions, delta nets, state spaces                     split by lengths, each sequence alone, joined again

So their result is that of each sequence alone, whatever such a layer does inside.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def mixers(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that mix tokens by a state: those with a convolution over the tokens."""
    return [module for module in model.modules() if any(isinstance(child, nn.Conv1d) for child in module.children())]


def divide(model: PreTrainedModel) -> None:
    """Make the mixers compute each sequence of a pack alone. The forward gets `lengths`, the tokens of each sequence.

    Without `lengths` they compute what they are given. Their input is `hidden_states` [1, T, H], the first argument.
    """
    lengths: tuple[int, ...] = ()

    def note(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        # The lengths stay until the next forward: gradient checkpointing computes layers again in the backward.
        nonlocal lengths
        lengths = given.get("lengths", ())

    def divided(mixer: nn.Module) -> None:
        whole = mixer.forward

        def forward(*given: Any, **named: Any) -> Any:
            if len(lengths) < 2:
                return whole(*given, **named)
            states, rest = (given[0], given[1:]) if given else (named.pop("hidden_states"), ())
            along = {  # other arguments with one entry for each token
                name: value.split(lengths, dim=1)
                for name, value in named.items()
                if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == states.shape[1]
            }
            parts = [
                whole(part, *rest, **named | {name: pieces[i] for name, pieces in along.items()})
                for i, part in enumerate(states.split(lengths, dim=1))
            ]
            return torch.cat(parts, dim=1)

        mixer.forward = forward

    found = mixers(model)
    if found:
        model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    for mixer in found:
        divided(mixer)
