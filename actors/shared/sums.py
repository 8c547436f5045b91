"""A digest of a tensor's bytes that a GPU computes as fast as it reads them: two weighted sums modulo 2^64.

    w(i)    word i of the bytes: 32 bits, little-endian, signed; the last word is filled up with zeros
    A       sum of (2 i + 1) w(i)
    B       sum of m(i div BLOCK) r(i mod BLOCK) w(i)        m, r: odd numbers of 64 bits, pseudo-random

    digest  "sum:", and A and B in 16 hexadecimal digits each

Sums of integers modulo 2^64 are exact in any order, so all devices compute the same digest. After a change of one word
A and B differ: the difference of the words is below 2^32 and the factor is odd, so the product is no multiple of 2^64.
After an exchange of two different words A differs in a tensor of up to 8 GiB: the differences of the factors and of the
words have a product below 2^64. After other damage both are the same by a chance of about 2^-128. As xxh3, it is
no protection against bytes that are chosen to have the same digest.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sdft.actors.shared.types import TensorEntry

SUM = "sum:"
BLOCK = 1 << 20  # words that are summed at once, with 24 bytes for each: the cache of a large GPU holds them
MODULUS = 1 << 64


def sum_digests(payload: Tensor, entries: Sequence[TensorEntry]) -> list[str]:
    """Return the digest of each tensor in `payload` [nbytes] uint8. Waits for the GPU once, at the end."""
    factors = _factors(payload.device)
    sums: list[Tensor] = []
    blocks: list[int] = []  # of each tensor
    for entry in entries:
        parts = _words(payload[entry.offset : entry.offset + entry.nbytes]).split(BLOCK)
        sums += [(part * factors[:, : len(part)]).sum(1) for part in parts]
        blocks.append(len(parts))
    found = iter(torch.stack(sums).tolist() if sums else [])
    scales = _odd(torch.arange(BLOCK, BLOCK + max(blocks, default=0))).tolist()  # m
    return [_joined([next(found) for _ in range(count)], scales) for count in blocks]


def damaged(payload: Tensor, entries: Sequence[TensorEntry]) -> str | None:
    """Return the name of the first tensor in `payload` that differs from its digest; None: all are right."""
    found = zip(entries, sum_digests(payload, entries), strict=True)
    return next((entry.name for entry, digest in found if digest != entry.digest), None)


def _joined(sums: Sequence[tuple[int, int, int]], scales: Sequence[int]) -> str:
    """Return the digest of a tensor. sums: those of w, (2 i + 1) w and r w in each block, i counted from its start."""
    a = sum(of_line + 2 * BLOCK * block * plain for block, (plain, of_line, _) in enumerate(sums))
    b = sum(scale * of_random for scale, (_, _, of_random) in zip(scales, sums, strict=False))
    return f"{SUM}{a % MODULUS:016x}{b % MODULUS:016x}"


def _words(raw: Tensor) -> Tensor:
    """Return bytes [N] uint8 as int32. They are copied if they do not begin and end at a multiple of 4."""
    if raw.nbytes % 4 or raw.storage_offset() % 4:
        filled = raw.new_zeros(-(-raw.nbytes // 4) * 4)
        filled[: raw.nbytes] = raw
        raw = filled
    return raw.view(torch.int32)


@lru_cache
def _factors(device: torch.device) -> Tensor:
    """Return the factors of the words of a block, [3, BLOCK] int64: 1, 2 i + 1 and r(i)."""
    i = torch.arange(BLOCK, device=device)
    return torch.stack([torch.ones_like(i), 2 * i + 1, _odd(i)])


def _odd(i: Tensor) -> Tensor:
    """Return output i of the generator SplitMix64 from seed 0 (Steele, Lea and Flood 2014), made odd. i: int64."""
    z = (i + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return (z ^ _shifted(z, 31)) | 1


def _signed(number: int) -> int:
    return number - MODULUS


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill up with zeros; torch's own shift of int64 repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
