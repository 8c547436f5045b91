"""The class that a user's environment is derived from. One object of it is one episode.

class House(Environment):
    async def reset(self, record):
        self.lights = set()

    async def step(self, reply):
        if "Done" in reply:
            return Done(passed=self.lights == {"hall"}, feedback="the light in the hall is off")
        self.lights.add(reply)
        return "ok"
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Answer = str | Sequence[Mapping[str, Any]]  # of the user, or messages with role and content


@dataclass(frozen=True)
class Done:
    """The episode has ended."""

    passed: bool  # whether the task is solved: what evaluation sets count
    feedback: str = ""  # what was wrong, for people and for algorithms that show it to the teacher


class Dropped(Exception):
    """Raised by `step`: the episode cannot go on, and is dropped with this reason in the ledger."""


class Environment:
    """One episode. The settings `environment.settings` are the arguments of its constructor."""

    @classmethod
    def prepare(cls, settings: Mapping[str, Any]) -> None:
        """Do what all episodes of a process need, once, before they begin. It may take a minute."""

    async def reset(self, record: Mapping[str, Any]) -> None:
        """Begin the episode of a record: its columns prompt (messages), answer, context, tools and id."""

    async def step(self, reply: str) -> Answer | Done:
        """Take a reply of the student, and return what answers it, or the end of the episode.

        An exception becomes the answer: the student sees its text. Dropped ends the episode.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Free what the episode holds. Called once at its end, also if `reset` has failed.

        A process that ends or blocks calls it no more.
        """
