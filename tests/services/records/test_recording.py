"""Recorded batches are read back unchanged, and `sdft replay` refuses impossible ranges."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdft.actors.shared.sequences import Span
from sdft.actors.shared.types import SampleId
from sdft.services.base.errors import UserError
from sdft.services.cli.replay import _range
from sdft.services.records.batches import read_batch, recorded_steps, write_batch
from tests.fakes.rollouts import make_rollouts


def test_a_batch_comes_back_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    samples = make_rollouts(tiny_model, 5, k=8, seed=0, skip=1)
    two, three = samples[2], make_rollouts(tiny_model, 4, k=3, seed=1)[3]  # another number of teacher tokens
    assert two.teacher is not None
    begin, end = two.spans[0].start, len(two)
    samples[2] = replace(
        two,
        sample=SampleId(3, 4, 5, 6),
        spans=(Span(7, begin, begin + 2), Span(8, begin + 2, end)),
        finish_reason="stop",
        seed=2**62,
        teacher=replace(two.teacher, version=9),
    )
    samples[3] = replace(three, objective=1)
    samples[4] = replace(samples[4], teacher=None)
    for i in (1, 3):
        samples[i] = replace(samples[i], experts=np.full((len(samples[i]), 2, 4), i, np.int16))
    write_batch(tmp_path, 12, samples)
    write_batch(tmp_path, 7, samples[4:])
    assert recorded_steps(tmp_path) == [7, 12]
    assert [s.teacher for s in read_batch(tmp_path, 7)] == [None]
    for mine, theirs in zip(read_batch(tmp_path, 12), samples, strict=True):
        for name in ("sample", "spans", "seed", "finish_reason", "objective"):
            assert getattr(mine, name) == getattr(theirs, name)
        assert (mine.teacher is None) == (theirs.teacher is None)
        assert (mine.experts is None) == (theirs.experts is None)
        arrays = [(getattr(mine, n), getattr(theirs, n)) for n in ("token_ids", "loss_mask", "logprobs")]
        if mine.experts is not None and theirs.experts is not None:
            arrays.append((mine.experts, theirs.experts))
        if mine.teacher is not None and theirs.teacher is not None:
            assert mine.teacher.version == theirs.teacher.version
            arrays += [(getattr(mine.teacher, n), getattr(theirs.teacher, n)) for n in ("ids", "logprobs", "sampled")]
        for a, b in arrays:
            assert a.dtype == b.dtype
            assert np.array_equal(a, b, equal_nan=a.dtype == np.float32)


@pytest.mark.parametrize(
    ("steps", "expected"), [(None, (3, 9)), ("4:6", (4, 6)), ("4:", (4, 9)), (":6", (3, 6)), ("5", (5, 5))]
)
def test_a_range_of_steps(steps: str | None, expected: tuple[int, int]) -> None:
    assert _range(steps, list(range(3, 10))) == expected


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("a:b", "give one step, or the first and the last as in 3:7"),
        ("6:4", "recorded steps 3 to 9"),
        ("1:4", "steps 3 to 9"),
    ],
)
def test_an_invalid_range_of_steps_is_refused(steps: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        _range(steps, list(range(3, 10)))
