"""The sentence on what bounds a run."""

from dataclasses import replace
from typing import Any

import pytest

from sdft.services.analysis.bottleneck import verdict
from sdft.services.records.rows import StepMetrics
from tests.services.records.test_metrics import STEP


def steps(count: int = 5, /, **times: float) -> list[StepMetrics]:
    """Return steps of 10 seconds with the given phases."""
    zero = dict.fromkeys((f"time_{phase}_s" for phase in ("rollout", "score", "learn", "sync", "wait")), 0.0)
    given: dict[str, Any] = zero | {f"time_{phase}_s": seconds for phase, seconds in times.items()}
    return [replace(STEP, step=i + 1, time_step_s=10.0, **given) for i in range(count)]


def said(rows: list[StepMetrics], staleness: int, **config: Any) -> str:
    """Return the sentence; fails if there is none."""
    text = verdict(rows, {"training": {"max_staleness": staleness}, **config})
    assert text is not None
    return text


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ({"rollout": 6, "learn": 3}, ["sampling, 60.0 % of a step", "actors.student.replicas"]),
        ({"score": 5, "learn": 3}, ["the teacher's scoring, 50.0 %", "actors.teacher.replicas"]),
        ({"rollout": 2, "learn": 7}, ["the learner's step, 70.0 %", "learner.ranks"]),
        ({"sync": 6, "learn": 3}, ["weight updates, 60.0 %", "weights.teacher_sync_every"]),
        ({"wait": 6, "learn": 3}, ["waiting for checkpoints, 60.0 %", "checkpoint.every"]),
    ],
)
def test_a_strict_run_is_bound_by_its_longest_phase(times: dict[str, float], words: list[str]) -> None:
    text = said(steps(**times), 0)
    assert all(word in text for word in [*words, "training.max_staleness: 1"])


def test_a_run_ahead_is_bound_by_what_it_waits_for() -> None:
    slow = said(steps(rollout=12, score=3, learn=6, wait=3), 2)
    assert slow == "the engines: the learner waits 30.0 % of the time; raise actors.student.max_replicas"
    assert "actors.teacher.max_replicas" in said(steps(rollout=3, score=9, learn=6, wait=3), 2)
    assert "the learner's step, 90.0 % of a step, while the engines keep ahead" in said(steps(rollout=8, learn=9), 1)
    assert "update the engines less often" in said(steps(rollout=8, learn=4, sync=5), 1)


LIVE, FROZEN = {"weights": "live"}, {"weights": "frozen"}


@pytest.mark.parametrize(
    ("config", "times", "mend"),
    [
        ({"method": "off_policy"}, {"rollout": 6}, "use more teacher engines (actors.teacher.replicas), or overlap"),
        ({"method": "off_policy", "teacher": LIVE}, {"rollout": 6}, "more student engines (actors.student.replicas)"),
        (
            {"teacher": LIVE},
            {"score": 6},
            "more student engines (actors.student.replicas), or overlap it with learning",
        ),
        ({"teacher": LIVE}, {"sync": 6}, "weight updates, 60.0 % of a step; overlap it with sampling"),
        ({"teacher": FROZEN}, {"sync": 6}, "weight updates, 60.0 % of a step; overlap it with sampling"),
        ({"stages": [{"method": "off_policy"}]}, {"rollout": 6}, "more teacher engines"),
        ({"method": "off_policy", "stages": [{"method": None}]}, {"rollout": 6}, "more teacher engines"),
    ],
)
def test_the_advice_names_the_engines_that_do_the_work(
    config: dict[str, Any], times: dict[str, float], mend: str
) -> None:
    assert mend in said(steps(**times), 0, **config)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("method", ["sft", "dft"])
def test_the_advice_for_sft_and_dft_names_neither_engines_nor_staleness(method: str, staleness: int) -> None:
    learning, waiting = (said(steps(**t), staleness, method=method) for t in ({"learn": 8.0}, {"learn": 4, "wait": 6}))
    assert learning == "the learner's step, 80.0 % of a step; use more learner ranks (learner.ranks)"
    assert waiting == "waiting for checkpoints, 60.0 % of a step; save checkpoints less often (checkpoint.every)"


def test_a_run_ahead_waits_for_the_engines_that_do_the_work() -> None:
    waits = steps(rollout=12, score=3, wait=3)
    assert "raise actors.teacher.max_replicas" in said(waits, 1, method="off_policy")
    assert "raise actors.student.max_replicas" in said(steps(rollout=3, score=12, wait=3), 1, teacher=LIVE)
    assert said(steps(sync=5), 1, teacher=LIVE).endswith("update the engines less often (weights.sync_every)")


def test_a_stage_is_judged_by_its_own_steps() -> None:
    before, now = steps(9, rollout=9), [replace(m, stage=1) for m in steps(3, learn=7)]
    assert said([*before, *now], 0, stages=[{}, {"method": "sft"}]).startswith("the learner's step, 70.0 %")
    assert verdict([*before, now[0]], {}) is None


def test_too_few_steps_tell_nothing_and_the_first_does_not_count() -> None:
    assert verdict(steps(2, learn=7), {}) is None
    first = replace(steps(1)[0], time_rollout_s=100.0, time_step_s=110.0)
    assert said([first, *steps(2, learn=7)], 0).startswith("the learner's step, 70.0 %")
