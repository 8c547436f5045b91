"""How many engines a pool should have: as many as it takes for the learner not to wait, and not many more.

Decided after each step, by what the step has shown. Twice in a row the same before anything is done, and nothing while
engines still join or leave, so that a single long rollout moves nothing.
"""

import math
from dataclasses import dataclass

WAITS, WAITS_NOT = 0.1, 0.02  # share of a step that the learner waits: above, below which it counts
FULL, IDLE = 0.8, 0.5  # share of a pool's room in use: above, below which it counts
WANTED_USE = 0.7  # that a smaller pool should have
IN_A_ROW_GROW, IN_A_ROW_SHRINK = 2, 5  # steps; an engine that is missed costs more than one too many
FASTEST = 2.0  # growth at once


@dataclass(frozen=True)
class Seen:
    """One step, as a pool sees it."""

    waited: float  # share of the step that the learner waited for samples
    busy: float  # share of the pool's room that was in use
    queued: int  # sequences that wait for an engine


class Scaler:
    """Decides for one pool."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._short = self._spare = 0  # steps in a row

    def wanted(self, size: int, seen: Seen) -> int:
        """How many engines the pool should have now that it has `size`, all of them at work."""
        short = seen.waited >= WAITS and (seen.busy >= FULL or seen.queued > 0)
        spare = seen.waited <= WAITS_NOT and seen.busy < IDLE and seen.queued == 0
        self._short = self._short + 1 if short else 0
        self._spare = self._spare + 1 if spare else 0
        wanted = size
        if self._short >= IN_A_ROW_GROW:
            # The learner could take 1 / (1 - waited) times as much.
            wanted = math.ceil(size * min(FASTEST, 1 / max(1e-9, 1 - seen.waited)))
        elif self._spare >= IN_A_ROW_SHRINK:
            wanted = min(size - 1, math.ceil(size * seen.busy / WANTED_USE))
        wanted = min(self._most, max(self._least, wanted))
        if wanted != size:
            self._short = self._spare = 0
        return wanted
