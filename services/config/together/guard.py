"""The retention guard, the sets that it guards, and the teacher that it lets refresh."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdft.services.config.run import RunConfig


def check(run: "RunConfig") -> None:
    """Raise ValueError, with the mend, unless what the guard compares is measured."""
    for each in (_sets, _pass_at, _gated_teacher):
        each(run)


def _sets(run: "RunConfig") -> None:
    """The guarded sets are among the evaluation sets."""
    if run.retention is not None and run.retention.max_drop is not None:
        names = [s.name for s in run.sets]
        missing = next((name for name in run.retention.sets if name not in names), None)
        if missing is not None:
            raise ValueError(
                f"retention.sets: there is no evaluation set {missing}; the sets are {', '.join(names) or 'none'}"
            )
        if not run.guarded:
            raise ValueError(
                "retention: no evaluation set has role: retention; add one, or name sets in retention.sets"
            )


def _pass_at(run: "RunConfig") -> None:
    """pass@k is sampled where it is guarded."""
    guarded = [s for s in run.sets if s.name in run.guarded]
    asked = run.retention is not None and run.retention.max_drop_pass_at is not None
    if asked and not any(s.pass_at for s in guarded):
        raise ValueError(
            "retention.max_drop_pass_at: no guarded set has pass_at; give it to one of them, or remove the key"
        )


def _gated_teacher(run: "RunConfig") -> None:
    """A gated teacher has a guard, and is measured between two refreshes."""
    every, retention, check = run.teacher.refresh_every, run.retention, run.evaluation.every
    if every is None:
        return
    if retention is None:
        raise ValueError(
            "teacher.weights gated needs the retention guard, which lets a refresh pass; set retention.detectors, "
            "or retention.max_drop"
        )
    if run.guarded and (check is None or check > every):
        raise ValueError(
            f"teacher.refresh_every {every} needs an evaluation of the guarded sets before each refresh; set "
            f"evaluation.every to at most {every}"
        )
    if retention.detectors is not None and every < 2 * retention.detectors.window:
        raise ValueError(
            f"teacher.refresh_every {every} is less than two windows of retention.detectors, which compare nothing "
            f"before; raise it to {2 * retention.detectors.window}, or lower window"
        )
    if run.weights.teacher_sync_every != 1:
        raise ValueError(
            "weights.teacher_sync_every has no effect with teacher.weights gated, whose refreshes are sent at "
            "once; remove it"
        )
