"""Digests of a snapshot's tensors in main memory, by several threads: xxh3 releases the interpreter's lock.

    payload ─► pieces of neighbouring tensors ─► the digest of each tensor, by any of the threads

A snapshot that was packed on a GPU has digests that a GPU computes (sums.py), and they are checked here too.

A piece has at least PIECE bytes: a tensor of a few kilobytes takes less time than to hand it to a thread.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import torch
import xxhash

from sdft.actors.shared.sums import SUM, sum_digests
from sdft.actors.shared.types import Snapshot, SnapshotDamaged, TensorEntry

MOST_THREADS = 8  # with these a copy of 3 GB to pinned memory and its digests took little longer than the copy (H200)
PIECE = 4 << 20


def digest(data: memoryview) -> str:
    """Return the digest of a tensor's bytes, in hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_threads(threads: int | None) -> ThreadPoolExecutor:
    """Return threads that compute digests: as many as asked for, None for one a core, but at most MOST_THREADS."""
    return ThreadPoolExecutor(min(threads or len(os.sched_getaffinity(0)), MOST_THREADS), "digests")


def check_digests(snapshot: Snapshot, payload: memoryview, threads: int | None) -> None:
    """Raise SnapshotDamaged, naming the first tensor whose bytes are not the learner's. threads: as digest_threads."""

    with digest_threads(threads) as pool:
        found = pool.map(partial(_digests, payload), _pieces(snapshot.tensors))
        for entry, one in zip(snapshot.tensors, chain.from_iterable(found), strict=True):
            if one != entry.digest:
                raise damage(snapshot, entry.name)


def damage(snapshot: Snapshot, name: str) -> SnapshotDamaged:
    """Return the error that says which tensor of a snapshot differs from its digest."""
    what = f"{snapshot.role} weights v{snapshot.version}: {name}"
    return SnapshotDamaged(f"{what} arrived damaged: its digest is not the learner's")


def _digests(payload: memoryview, piece: Sequence[TensorEntry]) -> list[str]:
    if piece and piece[0].digest.startswith(SUM):
        return sum_digests(torch.frombuffer(payload, dtype=torch.uint8), piece)
    return [digest(payload[e.offset : e.offset + e.nbytes]) for e in piece]


def _pieces(entries: Sequence[TensorEntry]) -> Iterator[list[TensorEntry]]:
    piece: list[TensorEntry] = []
    for entry in entries:
        piece.append(entry)
        if entry.offset + entry.nbytes - piece[0].offset >= PIECE:
            yield piece
            piece = []
    yield piece
