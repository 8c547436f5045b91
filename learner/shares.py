"""Divide a batch: each rank gets its sequences and their micro-batches. Does not import torch, so the driver can do it.

batch ─► assign: sequences to ranks, level in tokens ─► micro_batches: of one objective, up to a budget of tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdft.actors.shared.drafts import Draft
from sdft.actors.shared.sequences import TrainingSequence


@dataclass(frozen=True)
class Share:
    """What one rank computes of a batch."""

    sequences: tuple[Draft | TrainingSequence, ...]  # the rank's own; `LearnerWorker.fetch` makes drafts to sequences
    micro_batches: list[list[int]]  # indices of sequences with the same objective
    count: int  # micro-batches of the rank that has most: each is a collective
    batch_size: int  # sequences of the whole batch, over all ranks
    loss_tokens: int  # of the whole batch
    student_loss_tokens: int  # those of them that the student sampled

    def of(self, sequences: Sequence[TrainingSequence]) -> "Share":
        """Return the same share with the values of its sequences."""
        return replace(self, sequences=tuple(sequences))


def fetched(share: Share, number: int) -> list[TrainingSequence]:
    """Return the sequences of one of a share's micro-batches, whose values must be there."""
    members = [share.sequences[i] for i in share.micro_batches[number]]
    return [member for member in members if isinstance(member, TrainingSequence)]


def shares(batch: Sequence[Draft | TrainingSequence], ranks: int, budget: int) -> list[Share]:
    """Divide a batch over ranks. budget: tokens of a micro-batch."""
    lengths = [len(sequence) for sequence in batch]
    of_ranks = assign(lengths, ranks)
    plans = []
    for share in of_ranks:
        plan: list[list[int]] = []
        for objective in sorted({batch[i].objective for i in share}):
            places = [place for place, i in enumerate(share) if batch[i].objective == objective]
            packed = micro_batches([lengths[share[place]] for place in places], budget)
            plan += [[places[j] for j in members] for members in packed]
        plans.append(plan)
    loss_tokens = sum(sequence.loss_tokens for sequence in batch)
    student_loss_tokens = sum(sequence.student_loss_tokens for sequence in batch)
    return [
        Share(
            sequences=tuple(batch[i] for i in share),
            micro_batches=plan,
            count=max(map(len, plans)),
            batch_size=len(batch),
            loss_tokens=loss_tokens,
            student_loss_tokens=student_loss_tokens,
        )
        for share, plan in zip(of_ranks, plans, strict=True)
    ]


def assign(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Balance sequences over ranks by tokens: longest first, each to the least loaded rank. Indices per rank."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += lengths[i]
    return [sorted(share) for share in shares]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Fill micro-batches up to `budget` tokens, longest first. Returns indices per micro-batch.

    A sequence longer than the budget gets its own micro-batch.
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for b, load in enumerate(loads):
            if load + lengths[i] <= budget:
                bins[b].append(i)
                loads[b] += lengths[i]
                break
        else:
            bins.append([i])
            loads.append(lengths[i])
    return bins
