"""Causal attention inside each sequence of a pack, and none between sequences.

On a GPU in half precision, torch's variable-length kernel (flash attention) takes the whole pack at once. On a CPU,
matrix products take several short sequences at once. Otherwise the sequences are computed one after the other.
"""

import math
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from sdft.learner.division import Division
from sdft.learner.model.architecture import NotCausal, Untrainable
from sdft.learner.model.cpu.short_attention import ShortAttention

PACKED = "sdft_packed"
# Arguments of the whole forward that models also pass to attention, on which they have no effect.
HARMLESS = {"cache_position", "output_attentions", "output_hidden_states", "position_ids", "read", "use_cache"}
HALF = (torch.bfloat16, torch.float16)
SHORT, SHORT_IN_HALF = 256, 512  # tokens; up to this length a CPU's fused kernel takes as long or longer (see short)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: tuple[int, ...] = (),
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    division: Division | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence: query [1, heads, T, D], key and value [1, kv heads, T, D].

    Nothing is computed between sequences. sliding_window: how many tokens each token attends to, itself included.
    softcap: bound of the scores, softcap * tanh(score / softcap) (Gemma 2). s_aux: [heads], scores of the sinks, which
    take part in the softmax and have no value (gpt-oss). dropout is ignored, because rollouts are sampled without it.
    division: each rank gives the heads of its own tokens, and gets the same back; the lengths are of the whole pack.
    Returns [1, T, heads, D]. Raises Untrainable if a model's layers do not pass `lengths` on, or need what is not
    computed here.
    """
    unknown = sorted(name for name, given in others.items() if given is not None and name not in HARMLESS)
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotCausal("its attention uses later tokens, so it is no model that writes one token after the other")
    if unknown:
        raise Untrainable(f"its attention uses {', '.join(unknown)}, which the learner does not compute")
    if not lengths:
        raise Untrainable("its layers do not pass the lengths of packed sequences to their attention")
    if division is not None:
        query, key, value = (division.to_heads(x) for x in (query, key, value))
        sinks = None if s_aux is None else division.own_heads(s_aux)
        out = _attention(query, key, value, lengths, sliding_window, scaling, softcap, sinks)
        return division.to_tokens(out), None
    return _attention(query, key, value, lengths, sliding_window, scaling, softcap, s_aux), None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    sliding_window: int | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Return [1, T, heads, D], by the fastest way for the device, the dtype and the lengths."""
    window = sliding_window if sliding_window is not None and sliding_window < max(lengths) else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    same, plain = key.shape == value.shape, softcap is None and s_aux is None
    if plain and query.device.type == "cpu" and window is None and same and short(lengths, query.dtype):
        return ShortAttention.apply(query, key, value, lengths, scale).transpose(1, 2)
    if plain and query.device.type != "cpu" and query.dtype in HALF and same:
        return _varlen_attention(query, key, value, lengths, scale, window).unsqueeze(0)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if not plain:
        parts = [
            _with_extras(q[0], k[0], v[0], scale, window, softcap, s_aux)
            for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(parts, dim=1).transpose(0, 1)[None]
    attend = nn.functional.scaled_dot_product_attention
    parts = [
        attend(q, k, v, is_causal=True, scale=scale)
        if window is None or q.shape[2] <= window
        else attend(q, k, v, attn_mask=_band(q.shape[2], window, q.device), scale=scale)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _with_extras(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one sequence with a soft cap or sinks, by plain matrix products: [heads, L, D] each -> the same.

    No kernel of torch has both. The scores [heads, L, L] are kept for the gradient.
    """
    scores = query @ key.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = query.shape[1]
    scores = scores.masked_fill(~_band(length, window or length, query.device), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, length, 1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return weights[..., :length] @ value


def short(lengths: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether matrix products over several sequences are the fastest attention inside each on a CPU.

    Their time relative to the CPU's fused kernel, forward and backward: in bfloat16 0.1 to 0.2 up to 160 tokens, 0.5 at
    512 and 1 at 1024; in float32 0.5 to 0.8 up to 160 tokens, 1 at 256 and 1.4 at 512.
    """
    return max(lengths) <= (SHORT_IN_HALF if dtype in HALF else SHORT)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Mask under which each token attends to itself and the window - 1 tokens before it: [length, length] bool."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    """Packed attention on a GPU in half precision: [1, heads, T, D] each -> [T, heads, D].

    Keys and values may have fewer heads.
    """
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import, and a CPU does not need it

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # x[0] copies in backward
    bounds, longest = _bounds(lengths, query.device), max(lengths)
    before = -1 if window is None else window - 1
    out: Tensor = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(before, 0), enable_gqa=True
    )
    return out


@lru_cache(maxsize=2)  # every layer of a forward passes the same arguments
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The offset of each sequence's start, and of the end of the last one: [n + 1] int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


AttentionInterface.register(PACKED, packed_attention)
