"""Causal attention inside each short sequence of a pack, on a CPU: matrix products over many sequences at once.

Sequences of about the same length form a group, padded to its longest. The padding comes after every real position, so
the causal mask hides it. A row is one head of one token. One gather for all groups puts the rows into the order of the
products, and one puts them back: beside its products, a layer's cost is the number of calls.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sdft.learner.config import ATTENTION_KEPT
from sdft.learner.model.compat import softmax_backward

LEAST = 0.8  # least length of a member relative to its group's longest; the padding is computed and hidden
SCORES = 1 << 18  # attention scores per head computed at once, so that those of all heads fit into a cache


class ShortAttention(torch.autograd.Function):
    """query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, heads, T, D].

    Saves for backward these three, and the attention weights of groups whose longest has up to ATTENTION_KEPT tokens.
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
        given = [_padded(x, lengths) for x in (query, key, value)]
        out, kept = torch.empty_like(given[0]), list[Tensor]()
        for q, k, v, o in _of_groups(lengths, key.shape[1], *given, out):
            weights = _weights(q, k, scale)
            torch.bmm(weights, v, out=o)
            if k.shape[1] <= ATTENTION_KEPT:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return _packed(out, lengths)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths, scale = ctx.lengths, ctx.scale
        query, key, value, *kept = ctx.saved_tensors
        given = [_padded(x, lengths) for x in (query, key, value, grad)]
        # Padding must not contribute to the gradients of keys and values.
        given[3].index_fill_(0, _order(lengths, grad.shape[1]).padding, 0)
        grads = [torch.empty_like(x) for x in given[:3]]
        for q, k, v, g, grad_q, grad_k, grad_v in _of_groups(lengths, key.shape[1], *given, *grads):
            weights = kept.pop(0) if k.shape[1] <= ATTENTION_KEPT else _weights(q, k, scale)
            torch.bmm(weights.transpose(1, 2), g, out=grad_v)
            scores = torch.bmm(g, v.transpose(1, 2))
            scores = softmax_backward(scores, weights)
            torch.bmm(scores, k, out=grad_q)
            torch.bmm(scores.transpose(1, 2), q, out=grad_k)
        for x in grads[:2]:
            x.mul_(scale)
        return *(_packed(x, lengths) for x in grads), None, None


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention weights of a group: [n * kv heads, heads / kv heads * longest, longest], in the dtype of q."""
    longest = k.shape[1]
    future = torch.full((longest, longest), -torch.inf, dtype=q.dtype).triu(1).repeat(q.shape[1] // longest, 1)
    return torch.softmax(torch.baddbmm(future, q, k.transpose(1, 2), alpha=scale), -1)


class LengthGroup(NamedTuple):
    """Sequences whose attention is computed at once."""

    members: tuple[int, ...]  # indices in the pack, the longest first
    longest: int  # tokens


@lru_cache(maxsize=4)  # every layer passes the same lengths, forward and backward
def length_groups(lengths: tuple[int, ...]) -> tuple[LengthGroup, ...]:
    """Group sequences: each has at least LEAST of its group's longest; a group of several has at most SCORES."""
    found, members = list[LengthGroup](), list[int]()
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[members[0]] if members else lengths[i]
        if members and (lengths[i] < LEAST * longest or (len(members) + 1) * longest**2 > SCORES):
            found.append(LengthGroup(tuple(members), longest))
            members = []
        members.append(i)
    return (*found, LengthGroup(tuple(members), lengths[members[0]]))


class _Order(NamedTuple):
    there: Tensor  # for every padded row, its row of the pack; for padding, any row
    back: Tensor  # for every row of the pack, its padded row
    padding: Tensor  # indices of the padded rows that are padding


@lru_cache(maxsize=4)
def _order(lengths: tuple[int, ...], heads: int) -> _Order:
    """Map rows of a pack, [T, heads], to padded rows, [members, heads, longest] of one group after the other."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    there, real = [], []
    for members, longest in length_groups(lengths):
        members_lengths = torch.tensor([lengths[i] for i in members])[:, None, None]
        position = torch.arange(longest).expand(len(members), heads, longest)
        token = starts[list(members)][:, None, None] + position.minimum(members_lengths - 1)
        there.append((token * heads + torch.arange(heads)[:, None]).flatten())
        real.append((position < members_lengths).flatten())
    rows, exists = torch.cat(there), torch.cat(real)
    back = torch.empty(sum(lengths) * heads, dtype=torch.int64)
    back[rows[exists]] = exists.nonzero()[:, 0]
    return _Order(rows, back, (~exists).nonzero()[:, 0])


def _padded(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Gather padded rows: [1, heads, T, D] -> [padded rows, D]."""
    rows = x[0].transpose(0, 1).reshape(-1, x.shape[3])
    return rows.index_select(0, _order(lengths, x.shape[1]).there)


def _packed(padded: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Gather the pack's rows back: [padded rows, D] -> [1, heads, T, D]."""
    heads = _heads(padded, lengths)
    rows = padded.index_select(0, _order(lengths, heads).back)
    return rows.view(-1, heads, padded.shape[1]).transpose(0, 1)[None]


def _of_groups(lengths: tuple[int, ...], kv_heads: int, *padded: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield each group's part of each tensor: [members * kv heads, the tensor's heads / kv heads * longest, D]."""
    tokens = [len(members) * longest for members, longest in length_groups(lengths)]
    parts = [x.split([n * _heads(x, lengths) for n in tokens]) for x in padded]
    for group, *its_parts in zip(length_groups(lengths), *parts, strict=True):
        yield tuple(x.view(len(group.members) * kv_heads, -1, x.shape[1]) for x in its_parts)


def _heads(padded: Tensor, lengths: tuple[int, ...]) -> int:
    """The number of heads of each token in padded rows."""
    return len(padded) // sum(len(members) * longest for members, longest in length_groups(lengths))
