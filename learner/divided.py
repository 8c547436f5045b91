"""One rank's part of a micro-batch that several ranks divide: consecutive tokens, and the loss of some sequences.

pack [T] ─► tokens of each rank in turn ─► states of loss tokens ─► to the rank that computes their sequence's loss
"""

from dataclasses import replace
from itertools import accumulate

import torch
from torch.distributed import ProcessGroup

from sdft.learner.division import Division
from sdft.learner.packing import MicroBatch
from sdft.learner.shares import assign


def part_of(batch: MicroBatch, group: ProcessGroup, rank: int, size: int) -> MicroBatch:
    """Return the part of the rank with this number in a group of `size`. The batch has at least as many tokens."""
    tokens = len(batch.input_ids)
    sizes = [tokens // size + (i < tokens % size) for i in range(size)]
    ends = torch.tensor(list(accumulate(sizes)))
    rows = torch.bincount(batch.targets.sequence, minlength=len(batch.lengths)).tolist()
    owners = torch.zeros(len(batch.lengths), dtype=torch.int64)
    for owner, sequences in enumerate(assign(rows, size)):
        owners[sequences] = owner
    owner_of = owners[batch.targets.sequence]  # of each loss token
    place_of = torch.bucketize(batch.predicting, ends, right=True)  # the rank that computes its state
    here, own = place_of == rank, owner_of == rank
    order = torch.argsort(owner_of[here], stable=True)  # those for rank 0 first; a rank's own stay in their order
    first = int(ends[rank]) - sizes[rank]
    place = slice(first, int(ends[rank]))
    return replace(
        batch,
        input_ids=batch.input_ids[place],
        position_ids=batch.position_ids[place],
        predicting=batch.predicting[here][order] - first,
        targets=batch.targets.rows(own),
        experts=None if batch.experts is None else batch.experts[place],
        division=Division(
            group,
            rank,
            tuple(sizes),
            sent=tuple(torch.bincount(owner_of[here], minlength=size).tolist()),
            received=tuple(torch.bincount(place_of[own], minlength=size).tolist()),
        ),
    )
