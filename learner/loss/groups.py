"""How the rows of the loss are divided into chunks, whose logits exist at a time, and groups of chunks."""

import torch
from torch import Tensor


def groups_of(sequence: Tensor, level: str, most: int) -> list[list[slice]]:
    """Split the rows into chunks of at most `most`, in groups whose objectives are computed at once.

    The logits of a group of one chunk are computed once, those of other groups twice. On a CPU the products dominate,
    so a chunk is a group. If the importance weights need all tokens of a sequence, a chunk ends where a sequence ends,
    and only a sequence longer than a chunk is cut. On a GPU the many small kernels of the objective dominate, so all
    rows are one group.
    """
    rows = len(sequence)
    if sequence.is_cuda:
        return [_cut(0, rows, most)] if rows else []
    if level != "sequence":
        return [[chunk] for chunk in _cut(0, rows, most)]
    groups: list[list[slice]] = []
    start = end = 0
    for count in torch.unique_consecutive(sequence, return_counts=True)[1].tolist():
        if start < end and end - start + count > most:
            groups.append([slice(start, end)])
            start = end
        end += count
        if count > most:
            groups.append(_cut(start, end, most))
            start = end
    if start < end:
        groups.append([slice(start, end)])
    return groups


def _cut(start: int, end: int, most: int) -> list[slice]:
    return [slice(i, min(i + most, end)) for i in range(start, end, most)]
