"""Ranks that divide the tokens of a pack: attention exchanges tokens for heads, and back (Ulysses, arXiv:2309.14509).

    T / n tokens, all heads ─► all to all ─► T tokens, heads / n ─► attention ─► all to all ─► T / n tokens, all heads

All other layers compute each token by itself. The loss needs the rows of whole sequences: after the last layer the
states of each sequence's loss tokens go to one rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Division:
    """How the ranks of a group divide the tokens of one pack."""

    group: ProcessGroup
    rank: int  # in the group
    sizes: tuple[int, ...]  # tokens of each rank, in their order in the pack
    sent: tuple[int, ...]  # loss tokens whose states this rank sends to each rank
    received: tuple[int, ...]  # and receives from each

    def to_heads(self, x: Tensor) -> Tensor:
        """This rank's heads of all tokens, [1, heads, T / n, D] -> [1, heads / n, T, D].

        Fewer heads than ranks, of keys and values, are repeated.
        """
        ranks, (_, heads, tokens, width) = len(self.sizes), x.shape
        if heads < ranks:
            x, heads = x.repeat_interleave(ranks // heads, dim=1), ranks
        of_token = heads // ranks * width
        moved = self._moved(x, [tokens * of_token] * ranks, [size * of_token for size in self.sizes])
        parts = moved.split([size * of_token for size in self.sizes])
        whole = [part.view(1, heads // ranks, size, width) for part, size in zip(parts, self.sizes, strict=True)]
        return torch.cat(whole, dim=2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """All heads of this rank's tokens, [1, T, heads / n, D] -> [1, T / n, heads, D]."""
        _, _, heads, width = x.shape
        own, of_token = self.sizes[self.rank], heads * width
        moved = self._moved(x, [size * of_token for size in self.sizes], [own * of_token] * len(self.sizes))
        return moved.view(len(self.sizes), own, heads, width).transpose(0, 1).reshape(1, own, -1, width)

    def own_heads(self, of_heads: Tensor) -> Tensor:
        """The entries of this rank's heads, [heads] -> [heads / n]."""
        return of_heads.chunk(len(self.sizes))[self.rank]

    def to_owners(self, states: Tensor) -> Tensor:
        """The states of the sequences whose loss this rank computes, from those that it has read, [N, H] -> [M, H]."""
        width = states.shape[1]
        moved = self._moved(states, [n * width for n in self.sent], [n * width for n in self.received])
        return moved.view(-1, width)

    def _moved(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        out: Tensor = _AllToAll.apply(x.reshape(-1), self.group, list(sent), list(received))
        return out


class _AllToAll(torch.autograd.Function):
    """Send consecutive parts of x [sum(sent)] to each rank, and receive one from each: [sum(received)]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _exchanged(x, group, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchanged(grad.contiguous(), ctx.group, ctx.received, ctx.sent), None, None, None


def _exchanged(x: Tensor, group: ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    out = x.new_empty(sum(received))
    torch.distributed.all_to_all_single(out, x, received, sent, group=group)
    return out


def groups(ranks: int, size: int) -> list[ProcessGroup]:
    """Make a group of each `size` ranks in a row. Collective."""
    return [torch.distributed.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]


def why_not(heads: int, kv_heads: int, ranks: int) -> str | None:
    """Return why attention with these numbers of heads cannot be divided over ranks, or None."""
    if heads % ranks or math.gcd(kv_heads, ranks) != min(kv_heads, ranks):
        return f"its {heads} heads of queries and {kv_heads} of keys cannot be divided over {ranks} ranks"
    return None
