"""The bottleneck of a run and its remedy, in one sentence, from the times of the last steps."""

from collections.abc import Sequence
from typing import Any

from sdft.services.records.figures import PHASES
from sdft.services.records.rows import StepMetrics
from sdft.services.records.settings import max_staleness, sampler_and_scorer, teacher_weights
from sdft.services.records.text import percent

LAST = 20  # steps that the verdict is based on
WAITING = 0.1  # share of a step from which the learner counts as waiting
ACTIVITIES = {phase.name: phase.activity for phase in PHASES}
MORE_RANKS = "use more learner ranks (learner.ranks)"
FEWER_CHECKPOINTS = "save checkpoints less often (checkpoint.every)"


def verdict(steps: Sequence[StepMetrics], config: dict[str, Any]) -> str | None:
    """Return the sentence; None while the stage has too few steps. The run's first step is left out as warm-up.

    config: the resolved configuration.
    """
    recent = [m for m in steps[1:][-LAST:] if m.stage == steps[-1].stage]
    total = sum(m.time_step_s for m in recent)
    if len(recent) < 2 or total == 0:
        return None
    shares = {phase.name: sum(m.seconds(phase) for m in recent) / total for phase in PHASES}
    engines = sampler_and_scorer(config, recent[-1].stage)
    if max_staleness(config) == 0 or engines is None:
        phase = max(shares, key=lambda name: shares[name])
        remedies = _sequential_remedies(phase, config, recent[-1].stage)
        return f"{ACTIVITIES[phase]}, {percent(shares[phase])} of a step; {', or '.join(remedies)}"
    if shares["wait"] >= WAITING:
        role = engines[0 if shares["rollout"] >= shares["score"] else 1]
        return f"the engines: the learner waits {percent(shares['wait'])} of the time; raise actors.{role}.max_replicas"
    phase = "learn" if shares["learn"] >= shares["sync"] else "sync"
    updates = "sync_every, teacher_sync_every" if teacher_weights(config) == "ema" else "sync_every"
    remedy = MORE_RANKS if phase == "learn" else f"update the engines less often (weights.{updates})"
    return f"{ACTIVITIES[phase]}, {percent(shares[phase])} of a step, while the engines keep ahead; {remedy}"


def _sequential_remedies(phase: str, config: dict[str, Any], stage: int) -> list[str]:
    """Return remedies for runs with sequential phases: strict runs, and methods without sampling.

    A remedy shortens the longest phase or overlaps it with others.
    """
    engines = sampler_and_scorer(config, stage)
    if engines is None:
        return [FEWER_CHECKPOINTS if phase == "wait" else MORE_RANKS]
    sampler, scorer = engines
    remedies = {
        "rollout": f"use more {sampler} engines (actors.{sampler}.replicas)",
        "score": f"use more {scorer} engines (actors.{scorer}.replicas)",
        "learn": MORE_RANKS,
        "wait": FEWER_CHECKPOINTS,
    }
    if teacher_weights(config) == "ema":
        remedies["sync"] = "update the teacher less often (weights.teacher_sync_every)"
    shorter = [remedies[phase]] if phase in remedies else []
    overlapped = "sampling" if phase in ("learn", "sync", "wait") else "learning"
    return [*shorter, f"overlap it with {overlapped} (training.max_staleness: 1)"]
