"""The bounds on an engine's log-probs before and after weight updates."""

import dataclasses

import numpy as np
import pytest

from sdft.actors.shared.agreement import Agreement
from sdft.actors.shared.types import FloatArray, Snapshot, WeightMismatch

LIMIT = 0.08  # the limit for bfloat16
ENGINE = -np.linspace(1, 6, 47, dtype=np.float32)  # the engine's log-probs with the weights that it loaded
BASE = Snapshot("student", 0, "", "here", 0, (), np.arange(48, dtype=np.int32), ENGINE * np.float32(1.001))


def apart(logprobs: FloatArray, gap: float) -> FloatArray:
    """Return log-probs with the relative difference `gap` to the given ones."""
    return logprobs * np.float32(1 + gap)


def later(moved: float) -> Snapshot:
    """Return a snapshot after training, whose log-probs differ from those of BASE by the share `moved`."""
    return dataclasses.replace(BASE, version=1, probe_logprobs=apart(BASE.probe_logprobs, moved))


def started() -> Agreement:
    """Return the agreement of an engine that has been sent the weights that it had loaded."""
    agreement = Agreement(LIMIT)
    agreement.before_first(BASE, ENGINE)
    assert agreement.after(BASE, ENGINE) == pytest.approx(0.001, rel=0.01)
    return agreement


def test_a_model_that_engine_and_learner_compute_differently_is_refused_before_any_update() -> None:
    with pytest.raises(WeightMismatch, match=r"^student engine and learner with the .* folder.* 0\.1 .*choose another"):
        Agreement(LIMIT).before_first(BASE, apart(BASE.probe_logprobs, 0.1))


def test_an_update_to_the_same_weights_that_changes_log_probs_is_refused() -> None:
    """The bound is far below the one between engine and learner: copies of experts in bfloat16 showed a gap of 0.05."""
    agreement = Agreement(LIMIT)
    agreement.before_first(BASE, ENGINE)
    with pytest.raises(
        WeightMismatch, match=r"^student weights v0: .* same weights differ by 0\.02 .*allowed: 0\.0013"
    ):
        agreement.after(BASE, apart(ENGINE, 0.02))


@pytest.mark.parametrize(("moved", "gap", "agrees"), [(0.01, 0.01, True), (0.01, 0.05, False), (0.4, 0.05, True)])
def test_the_gap_after_training_may_be_larger_the_more_the_log_probs_have_moved(
    moved: float, gap: float, agrees: bool
) -> None:
    snapshot = later(moved)
    if agrees:
        assert started().after(snapshot, apart(snapshot.probe_logprobs, gap)) == pytest.approx(gap, rel=0.01)
    else:
        with pytest.raises(
            WeightMismatch, match=r"^student weights v1: .* learner's differ by 0\.05 .*allowed: 0\.014"
        ):
            started().after(snapshot, apart(snapshot.probe_logprobs, gap))


@pytest.mark.parametrize("agreement", [started(), Agreement(LIMIT)])
def test_a_gap_above_the_limit_or_nan_is_refused(agreement: Agreement) -> None:
    if agreement.untried:  # a replacement: its own weights differ from the first snapshot that it is sent
        agreement.before_first(later(0.4), ENGINE)
    snapshot = later(0.4)
    assert agreement.after(snapshot, apart(snapshot.probe_logprobs, 0.07)) < LIMIT
    for gap in (0.09, float("nan")):
        with pytest.raises(WeightMismatch, match=r"weights v1: .*\(allowed: 0\.08\)"):
            agreement.after(snapshot, apart(snapshot.probe_logprobs, gap))
