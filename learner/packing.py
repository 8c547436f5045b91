"""Pack scored rollouts into micro-batches: sequences end to end, without padding.

The loss is the mean over a batch's sequences of the mean over a sequence's loss tokens. Each row carries its share of
that mean, so packing, order, micro-batch size and number of ranks cannot change the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft.actors.shared.types import ScoredRollout
from sdft.learner.loss.targets import Targets


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed into one forward."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in every sequence
    lengths: tuple[int, ...]  # tokens of each sequence; they sum to T
    predicting: Tensor  # [N] int64, positions whose hidden state predicts a loss token
    targets: Targets

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Return the micro-batch on another device."""
        return MicroBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.lengths,
            self.predicting.to(device),
            self.targets.to(device),
        )


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


def length(sample: ScoredRollout) -> int:
    """Return the number of tokens that the student's forward computes for a sample."""
    return len(sample.rollout.prompt_ids) + len(sample.rollout.completion_ids)


def pack(samples: Sequence[ScoredRollout], skip_first: int, batch_size: int, top_k: int) -> MicroBatch:
    """Pack samples into one micro-batch; `batch_size` is the number of sequences of the whole batch, over all ranks.

    A completion not longer than `skip_first` has no rows and contributes zero. Without samples the micro-batch is two
    tokens without rows, because a rank without work still takes part in every collective.
    """
    ids, positions, predicting, offset = [], [], [], 0
    sampled, sampler, teacher_ids, teacher_logprobs, teacher_sampled, sequence, share = [], [], [], [], [], [], []
    for i, sample in enumerate(samples):
        rollout, scores = sample.rollout, sample.scores
        prompt, completion = (
            torch.from_numpy(rollout.prompt_ids.copy()),
            torch.from_numpy(rollout.completion_ids.copy()),
        )
        total, loss_tokens = len(prompt) + len(completion), max(0, len(completion) - skip_first)
        ids.append(torch.cat([prompt, completion]))
        positions.append(torch.arange(total))
        # The state at position t predicts token t + 1.
        predicting.append(torch.arange(offset + total - loss_tokens - 1, offset + total - 1))
        rows = slice(len(completion) - loss_tokens, None)
        sampled.append(completion[rows])
        sampler.append(torch.tensor(rollout.logprobs[rows]))
        teacher_ids.append(torch.tensor(scores.ids[rows]))
        teacher_logprobs.append(torch.tensor(scores.logprobs[rows]))
        teacher_sampled.append(torch.tensor(scores.sampled[rows]))
        sequence.append(torch.full((loss_tokens,), i))
        share.append(torch.full((loss_tokens,), 1.0 / (max(1, loss_tokens) * batch_size)))
        offset += total
    if not samples:
        ids, positions = [torch.zeros(2, dtype=torch.int32)], [torch.arange(2)]
    return MicroBatch(
        input_ids=torch.cat(ids).long(),
        position_ids=torch.cat(positions),
        lengths=tuple(length(s) for s in samples) or (2,),
        predicting=_cat(predicting, (0,)).long(),
        targets=Targets(
            sampled_ids=_cat(sampled, (0,)).long(),
            sampler_logprobs=_cat(sampler, (0,)),
            teacher_ids=_cat(teacher_ids, (0, top_k)).long(),
            teacher_logprobs=_cat(teacher_logprobs, (0, top_k)),
            teacher_sampled=_cat(teacher_sampled, (0,)),
            sequence=_cat(sequence, (0,)).long(),
            share=_cat(share, (0,)),
        ),
    )


def _cat(parts: list[Tensor], empty: tuple[int, ...]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(empty)
