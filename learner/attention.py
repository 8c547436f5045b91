"""Causal attention inside each sequence of a pack, and nothing between them: no mask, no padding that is computed.

On a GPU in half precision by torch's variable-length kernel (flash attention), which takes the whole pack at once; on a
CPU short sequences several at a time by matrix products; else one sequence after the other.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

PACKED = "sdft_packed"
SHORT = 256  # tokens; on sequences like these a CPU's fused kernel takes 1.4 times as long, forward and backward
CACHED_SCORES = 1 << 20  # attention scores worked on at once: 4 MB in float32
HALF = (torch.bfloat16, torch.float16)


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
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence: query [1, heads, T, D], key and value [1, kv heads, T, D].

    Nothing is computed between sequences. Returns [1, T, heads, D].
    """
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ValueError(f"a sequence of {max(lengths)} tokens is longer than the model's window of {sliding_window}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu" and max(lengths) <= SHORT:
        return _ShortAttention.apply(query, key, value, lengths, scale).transpose(1, 2), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if query.device.type == "cuda" and query.dtype in HALF:
        return _varlen_attention(query, key, value, lengths, scale)[None], None
    parts = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """The same for a GPU in half precision: [1, heads, T, D] each -> [T, heads, D]."""
    from torch.nn.attention.varlen import varlen_attn  # seconds to import, and of no use on a CPU

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    bounds, longest = _bounds(lengths, query.device), max(lengths)
    out: Tensor = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))
    return out


@lru_cache(maxsize=2)  # of a forward every layer asks for the same
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence begins, and where the last one ends: [n + 1] int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class _ShortAttention(torch.autograd.Function):
    """The same for a CPU: matrix products over several sequences at once, each padded to the longest of them.

    The padding comes after every real position, so the causal mask hides it. Only query, key, value and output are kept
    for the gradient; weights are computed again, some sequences at a time so that they stay in the cache.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        out = torch.empty_like(query)
        for group in _Group.all(query, key, lengths):
            q, k, v = (group.padded(x) for x in (query, key, value))
            group.write(out, torch.bmm(group.weights(q, k, scale).to(v.dtype), v))
        ctx.save_for_backward(query, key, value, out)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for group in _Group.all(query, key, ctx.lengths):
            q, k, v, o, g = (group.padded(x) for x in (query, key, value, out, grad))
            weights = group.weights(q, k, ctx.scale)
            group.write(grads[2], torch.bmm(weights.to(g.dtype).transpose(1, 2), g))
            # Softmax backward; the row sum of weights * d weights is that of out * d out (Dao et al. 2022).
            centre = (g.to(weights.dtype) * o).sum(-1, keepdim=True)
            scores = torch.bmm(g, v.transpose(1, 2)).to(weights.dtype).sub_(centre).mul_(weights).mul_(ctx.scale)
            scores = scores.to(q.dtype)
            group.write(grads[0], torch.bmm(scores, k))
            group.write(grads[1], torch.bmm(scores.transpose(1, 2), q))
        return *grads, None, None


@dataclass(frozen=True)
class _Group:
    """Neighbouring sequences of a pack, attended to at once."""

    start: int  # first token
    lengths: tuple[int, ...]
    kv_heads: int

    @classmethod
    def all(cls, query: Tensor, key: Tensor, lengths: tuple[int, ...]) -> "list[_Group]":
        """Groups whose scores fit into a cache."""
        groups, start, members = [], 0, list[int]()
        for length in lengths:
            longest = max([length, *members])
            if members and query.shape[1] * (len(members) + 1) * longest**2 > CACHED_SCORES:
                groups.append(cls(start, tuple(members), key.shape[1]))
                start, members = start + sum(members), []
            members.append(length)
        return [*groups, cls(start, tuple(members), key.shape[1])]

    def padded(self, x: Tensor) -> Tensor:
        """[1, heads, T, D] -> [n * kv heads, heads / kv heads * longest, D]."""
        part = x[0, :, self.start : self.start + sum(self.lengths)].transpose(0, 1)
        rows = pad_sequence(part.split(self.lengths), batch_first=True)  # [n, longest, heads, D]
        return rows.transpose(1, 2).reshape(len(rows) * self.kv_heads, -1, x.shape[-1])

    def weights(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Attention weights, float32 or wider: [n * kv heads, heads / kv heads * longest, longest]."""
        longest = max(self.lengths)
        future = torch.full((longest, longest), -torch.inf, dtype=q.dtype).triu(1).repeat(q.shape[1] // longest, 1)
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scale)
        return torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))

    def write(self, out: Tensor, x: Tensor) -> None:
        """Put [n * kv heads, heads / kv heads * longest, D] into its place in [1, heads, T, D]."""
        rows = x.view(len(self.lengths), out.shape[1], max(self.lengths), out.shape[-1])
        offset = self.start
        for sequence, length in zip(rows, self.lengths, strict=True):
            out[0, :, offset : offset + length] = sequence[:, :length]
            offset += length


AttentionInterface.register(PACKED, packed_attention)
