"""How many engines a pool should have: enough that the learner does not wait, and few more.

The scaler decides after each step from the step's measurements. It acts only after several steps in a row with the same
result, so that a single long rollout changes nothing. The caller skips it while engines join or leave.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sdft.services.fleet.pool import EnginePool

WAITS, WAITS_NOT = 0.1, 0.02  # share of a step that the learner waits: short from the first, spare up to the second
FULL, IDLE = 0.8, 0.5  # share of a pool's room in use: short from the first, spare below the second
WANTED_USE = 0.7  # share of the room that a smaller pool should have in use
IN_A_ROW_GROW, IN_A_ROW_SHRINK = 2, 5  # steps; a missing engine costs more than an extra one
FASTEST = 2.0  # largest growth factor per decision


@dataclass(frozen=True)
class Seen:
    """Measurements of one step for one pool."""

    waited: float  # share of the step that the learner waited for samples
    busy: float  # share of the pool's room that was in use
    queued: int  # sequences that wait for an engine


class Scaler:
    """Decides the size of one pool, from `least` to `most` engines."""

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most
        self._short = self._spare = 0  # steps in a row

    def wanted(self, size: int, seen: Seen) -> int:
        """Return how many engines the pool should have after a step with `size` engines, all of them serving."""
        short = seen.waited >= WAITS and (seen.busy >= FULL or seen.queued > 0)
        spare = seen.waited <= WAITS_NOT and seen.busy < IDLE and seen.queued == 0
        self._short = self._short + 1 if short else 0
        self._spare = self._spare + 1 if spare else 0
        wanted = size
        if self._short >= IN_A_ROW_GROW:
            # Without waiting, the learner would use 1 / (1 - waited) times as many samples.
            wanted = math.ceil(size * min(FASTEST, 1 / max(1e-9, 1 - seen.waited)))
        elif self._spare >= IN_A_ROW_SHRINK:
            wanted = min(size - 1, math.ceil(size * seen.busy / WANTED_USE))
        wanted = min(self._most, max(self._least, wanted))
        if wanted != size:
            self._short = self._spare = 0
        return wanted


class Autoscaler:
    """Resizes pools: they grow while the learner waits for samples, and shrink while engines are idle."""

    def __init__(self, pools: Iterable[EnginePool]) -> None:
        """pools: those of a strict run are left out, because they have one size."""
        self._scalers = [
            (pool, Scaler(pool.settings.least, pool.settings.most)) for pool in pools if not pool.settings.strict
        ]

    def after_step(self, waited: float) -> None:
        """Decide after a step. waited: share of the step that the learner waited for samples."""
        for pool, scaler in self._scalers:
            seen = Seen(waited, pool.busy(), pool.queued)
            if not pool.changing:
                pool.resize(scaler.wanted(pool.size, seen))
