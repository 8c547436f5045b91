"""What the bytes of a snapshot change in those of the version before, exactly.

    old, new ─► changes ─► places and values ─► apply, over the old bytes ─► the new ones

The unit is a pair of bytes, the size of a bfloat16. A block of 65536 pairs has a count of its changes, so that a place
inside it takes two bytes, as its value does: a changed bfloat16 takes four bytes instead of two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

N = TypeVar("N", bound=np.generic)
Bytes = NDArray[np.uint8]
BLOCK = 1 << 16
AT_ONCE = 256 * BLOCK  # pairs that are compared at once, with a byte for each
MOST = 0.25  # of the whole size; more changes are not worth the comparison


@dataclass(frozen=True)
class Changes:
    """Changed pairs of bytes, in order."""

    counts: NDArray[np.uint32]  # [blocks]
    places: NDArray[np.uint16]  # [N], in their blocks
    values: NDArray[np.uint16]  # [N]
    rest: bytes  # the last byte, if the number of bytes is odd

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.counts.nbytes + self.places.nbytes + self.values.nbytes + len(self.rest)


def changes(old: Bytes, new: Bytes) -> Changes | None:
    """Return what `new` changes in `old`, [nbytes] both, or None if it is more than MOST of the whole."""
    counts, places, values = [], [], []
    size = 0
    for was, now in zip(_pairs(old), _pairs(new), strict=True):
        found = np.flatnonzero(was != now)
        size += 4 * len(found)
        if size > MOST * new.nbytes:
            return None
        counts.append(np.bincount(found // BLOCK, minlength=-(-len(now) // BLOCK)).astype(np.uint32))
        places.append((found % BLOCK).astype(np.uint16))
        values.append(now[found])
    return Changes(_joined(counts, np.uint32), _joined(places, np.uint16), _joined(values, np.uint16), _rest(new))


def apply(found: Changes, held: Bytes) -> None:
    """Overwrite the old bytes [nbytes] with the new ones."""
    ends = np.concatenate([[0], np.cumsum(found.counts, dtype=np.int64)])
    done = 0  # blocks
    for part in _pairs(held):
        blocks = -(-len(part) // BLOCK)
        place = slice(ends[done], ends[done + blocks])
        starts = np.repeat(np.arange(blocks) * BLOCK, found.counts[done : done + blocks])
        part[starts + found.places[place]] = found.values[place]
        done += blocks
    if found.rest:
        held[-1] = found.rest[0]


def _pairs(data: Bytes) -> Iterator[NDArray[np.uint16]]:
    """Yield views of AT_ONCE pairs."""
    pairs = data[: data.nbytes // 2 * 2].view(np.uint16)
    for first in range(0, len(pairs), AT_ONCE):
        yield pairs[first : first + AT_ONCE]


def _rest(data: Bytes) -> bytes:
    return data[-1:].tobytes() if data.nbytes % 2 else b""


def _joined(parts: list[NDArray[N]], dtype: type[N]) -> NDArray[N]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
