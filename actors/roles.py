"""The roles of pools: which of the learner's weights the engines of a pool load, and what they do.

Everything that depends on a pool's role reads it here. A run has at most one pool of a role, so the name of the role
also names its snapshots and its group for broadcasts. Only external teachers may be several, each with a pool of its
own: their engines get no snapshots.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Final, Literal

RoleName = Literal["student", "teacher", "evaluation"]
STUDENT: Final = "student"
TEACHER: Final = "teacher"
EVALUATION: Final = "evaluation"


@dataclass(frozen=True)
class Role:
    """One role."""

    weights: Literal["student", "teacher"]  # the learner's weights that the engines load
    trains: bool  # the engines sample or score what is trained on


ROLES: dict[str, Role] = {
    STUDENT: Role(weights="student", trains=True),
    TEACHER: Role(weights="teacher", trains=True),
    EVALUATION: Role(weights="student", trains=False),
}


def teacher_pool(route: str) -> str:
    """Return the name of the pool of a teacher. route: its name in teacher.models; "" is the run's only teacher."""
    return f"{TEACHER}-{route}" if route else TEACHER


def evaluating(started: Container[str]) -> str:
    """Return the role on whose engines the evaluation sets run, of the started ones."""
    return EVALUATION if EVALUATION in started else STUDENT
