"""The changes between two versions of bytes: exact, and None where they are no gain."""

import numpy as np
import pytest

from sdft.actors.shared import changes as module
from sdft.actors.shared.changes import BLOCK, apply, changes

CHANCE = np.random.default_rng(0)


def changed(old: np.ndarray, pairs: int) -> np.ndarray:
    """Return bytes in which so many pairs differ from `old`."""
    new = old.copy()
    view = new[: len(new) // 2 * 2].view(np.uint16)
    places = CHANCE.choice(len(view), pairs, replace=False)
    view[places] ^= CHANCE.integers(1, 1 << 16, pairs, dtype=np.uint16)
    return new


@pytest.mark.parametrize("at_once", [BLOCK, 3 * BLOCK, 256 * BLOCK])
@pytest.mark.parametrize("nbytes", [1000, 2 * BLOCK, 2 * BLOCK + 2, 9 * BLOCK + 1])
def test_the_new_bytes_come_out(nbytes: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    old = CHANCE.integers(0, 256, nbytes, dtype=np.uint8)
    new = changed(old, nbytes // 40)
    new[-1] ^= 1
    found = changes(old, new)
    assert found is not None
    assert len(found.places) - nbytes // 40 in (0, 1)  # the last byte is of a pair of its own, or of none
    assert found.nbytes < 0.2 * nbytes + 8
    apply(found, old)
    assert np.array_equal(old, new)


def test_equal_bytes_have_no_changes_and_many_changes_are_no_gain() -> None:
    old = CHANCE.integers(0, 256, 4000, dtype=np.uint8)
    same = changes(old, old.copy())
    assert same is not None
    assert same.nbytes == 4  # the count of the only block
    assert changes(old, changed(old, 249)) is not None
    assert changes(old, changed(old, 251)) is None
    nothing = changes(old[:0], old[:0])
    assert nothing is not None
    apply(nothing, old[:0])


def test_the_last_bit_of_a_bfloat16_is_a_change() -> None:
    import torch

    old = torch.ones(100, dtype=torch.bfloat16)
    new = old.clone()
    new[7] = torch.nextafter(new[7], new[7] + 1)
    found = changes(old.view(torch.uint8).numpy(), new.view(torch.uint8).numpy())
    assert found is not None
    assert found.places.tolist() == [7]
