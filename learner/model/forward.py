"""The hidden states of packed sequences: one forward over the pack, or one forward per sequence.

    packs        attention through the interface of transformers: attention.py keeps the sequences apart; layers with a
                 convolution over the tokens: mixers.py divides the pack for them
    one by one   any other layer that mixes tokens: it would carry something from one sequence into the next

`attention_for` decides once, before the model is loaded. The model's attention implementation then says which it is.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from sdft.learner.division import Division, why_not
from sdft.learner.model.architecture import ATTENTION, BROKEN, BY_ITSELF, NotCausal, Untrainable, layer_kinds
from sdft.learner.model.attention import PACKED, packed_attention
from sdft.learner.model.mixers import divide, mixers

LENGTHS = (3, 2)  # of the sequences that are tried
COUNTED = "sdft_examined"


def hidden_states(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    lengths: tuple[int, ...],
    read: Tensor | None = None,
    division: Division | None = None,
) -> Tensor:
    """Last hidden states of packed sequences, ids and positions [T]: [T, H], or [N, H] of the tokens `read` [N].

    division: of a pack whose tokens several ranks divide; ids, positions and `read` are of this rank's part.
    """
    if not packs(model):
        parts = [model.base_model(input_ids=part[None], use_cache=False) for part in ids.split(lengths)]
        states = torch.cat([part.last_hidden_state[0] for part in parts])
    else:
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "lengths": lengths, "use_cache": False}
        if division is not None:
            inputs["division"] = division
        states = model.base_model(**inputs, read=read).last_hidden_state.squeeze(0)
    return states if read is None else states[read]


def packs(model: PreTrainedModel) -> bool:
    """Whether the model computes a pack in one forward."""
    return model.config.get_text_config()._attn_implementation == PACKED


def undivided(model: PreTrainedModel, ranks: int) -> str | None:
    """Return why ranks cannot divide the tokens of a pack, as the end of a sentence, or None."""
    if ranks == 1:
        return None
    if not packs(model) or mixers(model):
        return "layers carry something from each token to the next, so the tokens of a sequence stay on one rank"
    return why_not(*_heads(model.config), ranks)


def shared_by(config: Any) -> tuple[int, ...]:
    """Return the numbers of ranks that the attention heads of a model can be divided over."""
    try:
        heads, kv_heads = _heads(config)
    except (AttributeError, RuntimeError):  # none, or others in each layer
        return (1,)
    return tuple(ranks for ranks in range(1, heads + 1) if why_not(heads, kv_heads, ranks) is None)


def _heads(config: Any) -> tuple[int, int]:
    """Heads of queries, and of keys."""
    text = config.get_text_config()
    return text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def attention_for(config: Any) -> str | None:
    """Return the attention implementation to load a model with: ours if it packs, else transformers' choice (None)."""
    if why_alone(config) is None:
        return PACKED
    text = config.get_text_config()
    return "eager" if getattr(text, "attn_logit_softcapping", None) else None  # sdpa leaves the soft cap out


def why_alone(config: Any) -> str | None:
    """Return why a model computes the sequences of a pack one by one, as the end of a sentence, or None if it packs.

    A forward on torch's meta device, which allocates no memory, shows what the layers pass to the attention. Raises
    NotCausal if the attention reads later tokens.
    """
    windows: list[int | None] = []  # sliding_window of each attention call

    def counted(*given: Any, **named: Any) -> tuple[Tensor, None]:
        windows.append(named.get("sliding_window"))
        return packed_attention(*given, **named)

    AttentionInterface.register(COUNTED, counted)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    ids = torch.zeros_like(positions, device="meta")
    inputs = {"input_ids": ids[None], "position_ids": positions.to("meta")[None], "lengths": LENGTHS}
    try:
        with torch.device("meta"):
            # In bfloat16, because torch's product of grouped experts has no other dtype there.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=COUNTED)
        states = [kind for kind in layer_kinds(config) if kind not in ATTENTION | BY_ITSELF]
        if len(mixers(model)) < len(states):
            return f"layers of the type {', '.join(sorted(set(states)))} carry something from each token to the next"
        divide(model)
        with torch.no_grad():
            model.base_model(**inputs, use_cache=False, read=ids[:1])
    except NotCausal:
        raise
    except Untrainable as error:
        return str(error)
    except BROKEN as error:
        return f"its layers do not work with the learner's attention ({one_line(error)})"
    except RuntimeError as error:
        if mixers(model):
            return f"its layers do not work in a pack ({one_line(error)})"
        return None  # an operation needs memory; the learner compares its forward with the model's own at its start
    text, kinds = model.config.get_text_config(), layer_kinds(config)
    if len(windows) < sum(kind in ATTENTION for kind in kinds):
        return "its layers do not use the attention interface of transformers"
    if getattr(text, "layer_types", None) is None:
        kinds = ["sliding_attention"] * len(kinds)
    if getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True):
        limited = sum(window is not None for window in windows)
        if limited < kinds.count("sliding_attention"):
            return "its layers do not pass the window (sliding_window) to their attention"
    return None


def one_line(error: Exception) -> str:
    """An error's type and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
