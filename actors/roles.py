"""The roles of pools: which of the learner's weights the engines of a pool load, and what they do.

Everything that depends on a pool's role reads it here. A run has at most one pool of a role, so the name of the role
also names its snapshots and its group for broadcasts.
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


def scoring(started: Container[str]) -> str:
    """Return the role that scores, of the started ones: without teacher engines the student is the teacher."""
    return TEACHER if TEACHER in started else STUDENT


def evaluating(started: Container[str]) -> str:
    """Return the role on whose engines the evaluation sets run, of the started ones."""
    return EVALUATION if EVALUATION in started else STUDENT
