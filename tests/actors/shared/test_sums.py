"""The digest by sums: its formula in Python's integers, and the damage that it finds."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from sdft.actors.shared import sums
from sdft.actors.shared.sums import MODULUS, damaged, sum_digests
from sdft.actors.shared.types import TensorEntry

SIZES = (4, 0, 1, 6, 401, 3, 80, 1028)  # bytes: also tensors that do not begin or end at a word
BYTES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, sum(SIZES), dtype=np.uint8))


@pytest.fixture(autouse=True, params=[sums.BLOCK, 16], ids=["one block", "several blocks"])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "BLOCK", request.param)
    sums._factors.cache_clear()


def entries(*sizes: int) -> list[TensorEntry]:
    """Return tensors of these sizes, end to end, without digests."""
    ends = pairwise(accumulate(sizes, initial=0))
    return [TensorEntry(f"t{i}", "uint8", (b - a,), a, b - a, "") for i, (a, b) in enumerate(ends)]


def digest(raw: Tensor) -> str:
    """Return the digest of one tensor of these bytes."""
    (found,) = sum_digests(raw, entries(len(raw)))
    return found


def split_mix(i: int) -> int:
    """Return output i of SplitMix64 from seed 0."""
    z = (i + 1) * 0x9E3779B97F4A7C15 % MODULUS
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ z >> 27) * 0x94D049BB133111EB % MODULUS
    return z ^ z >> 31


def test_it_is_the_formula_in_the_docstring() -> None:
    """In Python's integers, which never overflow. The first outputs of SplitMix64 are those of its authors' program."""
    assert [split_mix(i) for i in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    for entry, found in zip(entries(*SIZES), sum_digests(BYTES, entries(*SIZES)), strict=True):
        raw = BYTES[entry.offset : entry.offset + entry.nbytes].numpy().tobytes()
        words = np.frombuffer(raw + bytes(-len(raw) % 4), "<i4").tolist()
        block = sums.BLOCK
        a = sum((2 * i + 1) * word for i, word in enumerate(words))
        b = sum((split_mix(block + i // block) | 1) * (split_mix(i % block) | 1) * w for i, w in enumerate(words))
        assert found == f"sum:{a % MODULUS:016x}{b % MODULUS:016x}"


def test_each_changed_byte_is_found_by_each_of_the_two_sums() -> None:
    raw = BYTES[:407].clone()
    whole = digest(raw)
    for i in range(len(raw)):
        for change in (1, 128, 255):
            raw[i] ^= change
            found = digest(raw)
            assert found[4:20] != whole[4:20], f"byte {i}"
            assert found[20:] != whole[20:], f"byte {i}"
            raw[i] ^= change
    assert digest(raw) == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exchanged_shifted_and_zeroed_elements_are_found(dtype: torch.dtype) -> None:
    count = 60
    values = (torch.arange(1, count + 1) / 8).to(dtype)  # all of them different
    changes = {"all zero": torch.zeros_like(values), "negative": -values, "doubled": 2 * values}
    for i in range(count):
        changes[f"shifted by {i}"] = values.roll(i) if i else torch.cat([values[1:], values[:1] * 0])
        changes[f"zero at {i}"] = values.clone()
        changes[f"zero at {i}"][i] = 0
        for j in range(i):
            order = torch.arange(count)
            order[[i, j]] = order[[j, i]]
            changes[f"{i} and {j} exchanged"] = values[order]
    digests = {name: digest(changed.view(torch.uint8)) for name, changed in changes.items()}
    assert len({*digests.values(), digest(values.view(torch.uint8))}) == len(changes) + 1


def test_exchanged_blocks_are_found() -> None:
    raw = torch.arange(4 * 3 * 16, dtype=torch.uint8)
    blocks = raw.view(3, -1)
    found = {digest(blocks[list(order)].reshape(-1)) for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0))}
    assert len(found) == 4


def test_the_first_damaged_tensor_is_named() -> None:
    whole = entries(*SIZES)
    digested = [
        TensorEntry(e.name, e.dtype, e.shape, e.offset, e.nbytes, one)
        for e, one in zip(whole, sum_digests(BYTES, whole), strict=True)
    ]
    assert damaged(BYTES, digested) is None
    changed = BYTES.clone()
    for entry in reversed(digested):
        if entry.nbytes:
            changed[entry.offset + entry.nbytes - 1] ^= 1
            assert damaged(changed, digested) == entry.name
