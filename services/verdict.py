"""What bounds a run and what would change it, in one sentence, from the times of its last steps."""

from collections.abc import Sequence

from services.metrics import StepMetrics, percent

LAST = 20  # steps that are looked at
WAITING = 0.1  # share of a step from which on the learner is said to wait

# In a strict run the phases come one after the other; the largest is what to change.
STRICT = {
    "rollout": ("sampling", "more student engines (actors.student.replicas), or learning meanwhile with"),
    "score": (
        "the teacher's scoring",
        "more teacher engines (actors.teacher.replicas), or scoring meanwhile with",
    ),
    "learn": ("the learner's step", "more learner ranks (learner.ranks), or sampling meanwhile with"),
    "sync": ("weight updates", "fewer of the teacher's (weights.teacher_sync_every), or sampling meanwhile with"),
    "wait": (
        "waiting for checkpoints",
        "fewer of them (checkpoint.every), or sampling meanwhile with",
    ),
}


def verdict(steps: Sequence[StepMetrics], max_staleness: int) -> str | None:
    """None while there are too few steps to tell: the first is left out, since it warms everything up."""
    recent = steps[1:][-LAST:]
    total = sum(m.time_step_s for m in recent)
    if len(recent) < 2 or total == 0:
        return None
    shares = {phase: sum(getattr(m, f"time_{phase}_s") for m in recent) / total for phase in STRICT}
    if max_staleness == 0:
        phase = max(shares, key=lambda name: shares[name])
        what, mend = STRICT[phase]
        return f"{what}, {percent(shares[phase])} of a step; {mend} training.max_staleness: 1"
    if shares["wait"] >= WAITING:
        pool = "student" if shares["rollout"] >= shares["score"] else "teacher"
        return f"the engines: the learner waits {percent(shares['wait'])} of the time; raise actors.{pool}.max_replicas"
    phase = "learn" if shares["learn"] >= shares["sync"] else "sync"
    what, _ = STRICT[phase]
    mend = "more learner.ranks" if phase == "learn" else "fewer updates (weights.sync_every, teacher_sync_every)"
    return f"{what}, {percent(shares[phase])} of a step, while the engines keep ahead; {mend}"
