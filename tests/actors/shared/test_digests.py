"""Digests by several threads: the same ones, at the same time, and the first damaged tensor is named."""

from itertools import accumulate, pairwise
from threading import Barrier

import numpy as np
import pytest
import xxhash

from sdft.actors.shared import digests
from sdft.actors.shared.digests import check_digests
from sdft.actors.shared.types import Snapshot, SnapshotDamaged, TensorEntry

SIZES = (3, digests.PIECE - 3, 1, 0, 1000, digests.PIECE + 1, 7)  # two whole pieces, and a rest
PAYLOAD = np.random.default_rng(0).integers(0, 256, sum(SIZES), dtype=np.uint8)
NOTHING = np.zeros(0, np.int32)


def snapshot() -> Snapshot:
    """Return a snapshot of PAYLOAD, its digests made one by one."""
    entries = tuple(
        TensorEntry(f"t{i}", "uint8", (b - a,), a, b - a, xxhash.xxh3_128_hexdigest(PAYLOAD[a:b].tobytes()))
        for i, (a, b) in enumerate(pairwise(accumulate(SIZES, initial=0)))
    )
    return Snapshot("student", 3, "", "", len(PAYLOAD), entries, NOTHING, NOTHING.astype(np.float32))


@pytest.mark.parametrize("threads", [None, 1, 2, 8])
def test_each_damaged_tensor_is_found_and_the_first_one_is_named(threads: int | None) -> None:
    whole = snapshot()
    check_digests(whole, PAYLOAD.data, threads)
    damaged = PAYLOAD.copy()
    for entry in reversed(whole.tensors):
        if entry.nbytes:
            damaged[entry.offset + entry.nbytes - 1] ^= 1
            with pytest.raises(SnapshotDamaged, match=rf"^student weights v3: {entry.name} arrived damaged"):
                check_digests(whole, damaged.data, threads)


def test_two_pieces_are_digested_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    both, own = Barrier(2), digests.digest

    def together(data: memoryview) -> str:
        if data.nbytes >= digests.PIECE - 3:
            both.wait(timeout=30)  # fails unless another thread is here
        return own(data)

    monkeypatch.setattr(digests, "digest", together)
    check_digests(snapshot(), PAYLOAD.data, threads=2)
