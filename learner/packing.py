"""Pack training sequences into micro-batches: end to end, without padding.

The loss is the mean over a batch's sequences of the mean over a sequence's loss tokens. Each row carries its share of
that mean, so packing, order, micro-batch size and number of ranks cannot change the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sdft.actors.shared.sequences import TrainingSequence, joined_experts
from sdft.actors.shared.types import IntArray, TeacherScores
from sdft.learner.division import Division
from sdft.learner.loss.targets import Targets


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed into one forward."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in every sequence
    lengths: tuple[int, ...]  # tokens of each sequence; they sum to T
    predicting: Tensor  # [N] int64, positions whose hidden state predicts a loss token
    targets: Targets
    experts: Tensor | None = None  # [T, routers, k] int64, -1 where the router chooses; None: it chooses everywhere
    # Ranks that divide the tokens: the other fields, but for `lengths`, are of this rank's part. None: it has all.
    division: Division | None = None

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Return the micro-batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            predicting=self.predicting.to(device),
            targets=self.targets.to(device),
            experts=None if self.experts is None else self.experts.to(device),
        )


def pack(sequences: Sequence[TrainingSequence], batch_size: int, top_k: int, least: int = 2) -> MicroBatch:
    """Pack sequences into one micro-batch; `batch_size` is the number of sequences of the whole batch, over all ranks.

    top_k: width of the teacher's scores, if there are no sequences to tell it.
    A sequence without a loss token has no rows and contributes zero. Up to `least` tokens are filled up by one that has
    none, because a rank without work still takes part in every collective.
    """
    ids, positions, predicting, offset = [], [], [], 0
    sampled, sampler, teacher_ids, teacher_logprobs, teacher_sampled = [], [], [], [], []
    sequence, completion, share = [], [], []
    for i, s in enumerate(sequences):
        tokens, rows = torch.from_numpy(s.token_ids.copy()), s.loss_mask.nonzero()[0]
        ids.append(tokens)
        positions.append(torch.arange(len(s)))
        predicting.append(torch.from_numpy(offset + rows - 1))  # the state at position t predicts token t + 1
        sampled.append(tokens[rows])
        sampler.append(torch.from_numpy(s.logprobs[rows]))
        teacher = s.teacher or _certain(s.token_ids[rows])
        teacher_ids.append(torch.tensor(teacher.ids))
        teacher_logprobs.append(torch.tensor(teacher.logprobs))
        teacher_sampled.append(torch.tensor(teacher.sampled))
        sequence.append(torch.full((len(rows),), i))
        completion.append(torch.full((len(rows),), float(s.sampled_tokens)))
        share.append(torch.full((len(rows),), 1.0 / (max(1, len(rows)) * batch_size)))
        offset += len(s)
    lengths = [len(s) for s in sequences]
    if (missing := least - sum(lengths)) > 0:
        lengths.append(missing)
        ids.append(torch.zeros(missing, dtype=torch.int32))
        positions.append(torch.arange(missing))
    chosen = [len(s) if s.experts is None else s.experts for s in sequences]
    experts = joined_experts([*chosen, *lengths[len(sequences) :]])
    return MicroBatch(
        input_ids=torch.cat(ids).long(),
        position_ids=torch.cat(positions),
        lengths=tuple(lengths),
        predicting=_cat(predicting, (0,)).long(),
        targets=Targets(
            sampled_ids=_cat(sampled, (0,)).long(),
            sampler_logprobs=_cat(sampler, (0,)),
            teacher_ids=_cat(teacher_ids, (0, top_k)).long(),
            teacher_logprobs=_cat(teacher_logprobs, (0, top_k)),
            teacher_sampled=_cat(teacher_sampled, (0,)),
            sequence=_cat(sequence, (0,)).long(),
            completion=_cat(completion, (0,)),
            share=_cat(share, (0,)),
        ),
        experts=None if experts is None else torch.from_numpy(experts).long(),
    )


def _certain(tokens: IntArray) -> TeacherScores:
    """Scores in place of a teacher's, for losses of the sequence's own tokens: each token is certain."""
    certain = np.zeros((len(tokens), 1), dtype=np.float32)
    return TeacherScores(tokens[:, None], certain, certain[:, 0], 0)


def _cat(parts: list[Tensor], empty: tuple[int, ...]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(empty)
