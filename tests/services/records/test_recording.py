"""Recorded batches are read back unchanged, and `sdft replay` refuses impossible ranges."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdft.actors.shared.types import SampleId, ScoredRollout
from sdft.services.base.errors import UserError
from sdft.services.cli.replay import _range
from sdft.services.records.batches import read_batch, recorded_steps, write_batch
from tests.fakes.rollouts import make_rollouts


def test_a_batch_comes_back_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    samples = make_rollouts(tiny_model, 5, k=8, seed=0)
    two = samples[2].rollout
    samples[2] = ScoredRollout(
        SampleId(3, 4, 5, 6),
        replace(two, versions=((7, 0, 2), (8, 2, len(two.completion_ids))), finish_reason="stop"),
        replace(samples[2].scores, version=9),
    )
    write_batch(tmp_path, 12, samples)
    write_batch(tmp_path, 7, samples[:1])
    again = read_batch(tmp_path, 12)
    assert recorded_steps(tmp_path) == [7, 12]
    assert [s.sample for s in again] == [s.sample for s in samples]
    for mine, theirs in zip(again, samples, strict=True):
        assert mine.rollout.versions == theirs.rollout.versions
        assert mine.rollout.finish_reason == theirs.rollout.finish_reason
        assert mine.scores.version == theirs.scores.version
        for a, b in (
            *((getattr(mine.rollout, n), getattr(theirs.rollout, n)) for n in ("prompt_ids", "completion_ids")),
            (mine.rollout.logprobs, theirs.rollout.logprobs),
            *((getattr(mine.scores, n), getattr(theirs.scores, n)) for n in ("ids", "logprobs", "sampled")),
        ):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)


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
