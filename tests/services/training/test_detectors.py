"""Detectors: what has drifted since the start of the stage, from the rows of its steps alone."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from sdft.services.config.detectors import DetectorsConfig
from sdft.services.records.rows import StepMetrics
from sdft.services.training.detectors import DETECTORS, Detectors
from tests.services.records.test_metrics import STEP

WINDOW = 2
OFF: dict[str, Any] = dict.fromkeys(detector.name for detector in DETECTORS)


def config(**thresholds: float | None) -> DetectorsConfig:
    """Return settings with only these detectors on."""
    return DetectorsConfig.model_validate({"window": WINDOW} | OFF | thresholds)


def rows(figure: str, values: Iterable[float | None], stage: int = 0, first: int = 1) -> list[StepMetrics]:
    changes: list[Any] = [{figure: value} for value in values]
    return [replace(STEP, step=step, stage=stage, **change) for step, change in enumerate(changes, first)]


def judged(detectors: Detectors, steps: Iterable[StepMetrics]) -> dict[int, list[str]]:
    """Return what each step finds, without the steps that find nothing."""
    found = {row.step: [str(drift) for drift in detectors.judge(row)] for row in steps}
    return {step: sentences for step, sentences in found.items() if sentences}


def test_every_detector_has_a_threshold_a_figure_and_a_default() -> None:
    names = [detector.name for detector in DETECTORS]
    assert {"window", "phrases", *names} == set(DetectorsConfig.model_fields)
    assert all(getattr(DetectorsConfig(), name) is not None for name in names)
    assert all(hasattr(STEP, detector.figure) for detector in DETECTORS)


def test_a_mean_of_now_is_compared_with_the_first_steps() -> None:
    found = judged(Detectors(config(length=2.0), ()), rows("length_mean", [10, 30, 20, 59, 60, 60]))
    assert found == {5: ["the mean length of completions rose from 20 to 59.5 at step 5: a factor of 2 is allowed"]}


def test_what_stays_out_is_told_once_and_again_after_it_was_back() -> None:
    values = [10, 10, 30, 30, 30, 10, 10, 30, 30]
    assert list(judged(Detectors(config(length=2.0), ()), rows("length_mean", values))) == [4, 9]


@pytest.mark.parametrize(
    ("name", "allowed", "fine", "bad", "said"),
    [
        ("length", 2.0, (100, 51), (100, 49), "fell from 100 to 49"),
        ("length_tail", 2.0, (100, 10), (100, 201), "rose from 100 to 201"),
        ("truncated", 0.2, (0.1, 0.3), (0.1, 0.31), "rose from 10.0 % to 31.0 % at step 4: 20 points are allowed"),
        ("empty", 0.1, (0.5, 0.0), (0.0, 0.2), "rose from 0.0 % to 20.0 %"),
        ("repeated", 0.2, (0.5, 0.1), (0.1, 0.4), "rose"),
        ("distinct", 0.3, (0.4, 1.0), (0.9, 0.5), "fell from 90.0 % to 50.0 %"),
        ("entropy", 4.0, (1.0, 0.3), (1.0, 0.2), "fell from 1 to 0.2"),
        ("divergence", 2.0, (0.001, 0.019), (0.3, 0.7), "rose from 0.3 to 0.7"),  # below 0.01 it is 0.01
        ("leaks", 0.1, (0.9, 0.1), (0.0, 0.2), "rose"),
        ("thoughts", 0.3, (0.5, 0.7), (1.0, 0.5), "fell from 100 % to 50.0 %"),
    ],
)
def test_each_figure_may_move_so_far(
    name: str, allowed: float, fine: tuple[float, float], bad: tuple[float, float], said: str
) -> None:
    (figure,) = [detector.figure for detector in DETECTORS if detector.name == name]
    for (before, now), expected in ((fine, False), (bad, True)):
        detectors = Detectors(config(**{name: allowed}), ())
        found = judged(detectors, rows(figure, [before] * WINDOW + [now] * WINDOW))
        assert bool(found) == expected
        assert not expected or said in found[4][0]
    assert judged(Detectors(config(), ()), rows(figure, [bad[0]] * WINDOW + [bad[1]] * WINDOW)) == {}


def test_each_stage_has_a_beginning_of_its_own() -> None:
    detectors = Detectors(config(length=2.0), ())
    assert judged(detectors, rows("length_mean", [10] * 4)) == {}
    assert judged(detectors, rows("length_mean", [50] * 4, stage=1, first=5)) == {}
    assert list(judged(detectors, rows("length_mean", [120] * 2, stage=1, first=9))) == [10]


def test_steps_without_a_figure_do_not_count() -> None:
    """As those of SFT, of older files, or with a gradient that is not finite."""
    detectors = Detectors(config(length=2.0, divergence=2.0), ())
    steps = rows("length_mean", [None, 10, None, None, None, 30, 30])
    steps[3] = replace(steps[3], divergence=math.nan)
    assert list(judged(detectors, steps)) == [6]
    assert judged(Detectors(config(length=2.0), ()), rows("length_mean", [None] * 6)) == {}


def test_the_last_step_without_a_drift_is_the_one_that_held() -> None:
    detectors, held = Detectors(config(length=2.0), ()), []
    for row in rows("length_mean", [10, 10, 10, 10, 10, 50, 50, 10, 10]):
        detectors.judge(row)
        held.append(detectors.held)
    assert held == [1, 2, 3, 4, 5, 5, 5, 5, 9]
    assert detectors.last["length"].step == 8


def test_a_resumed_run_judges_as_one_that_was_not_interrupted() -> None:
    steps = rows("length_mean", [10, 10, 10, 30, 30, 10, 10, 40, 40])
    whole = Detectors(config(length=2.0), steps)
    for stop in range(len(steps)):
        detectors = Detectors(config(length=2.0), steps[:stop])
        found = judged(detectors, steps[stop:])
        assert found == {s: t for s, t in judged(Detectors(config(length=2.0), ()), steps).items() if s > stop}
        assert (detectors.last, detectors.held) == (whole.last, whole.held)


def test_without_detectors_nothing_is_found() -> None:
    detectors = Detectors(None, rows("length_mean", [10, 10, 90, 90]))
    assert (detectors.judge(STEP), detectors.last, detectors.held) == ([], {}, None)
