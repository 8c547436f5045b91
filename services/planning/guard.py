"""What detectors and a gated teacher need of the schedule: a stage that is long enough."""

from collections.abc import Sequence

from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.data.schedule import StageSchedule


def check_guard(config: RunConfig, schedules: Sequence[StageSchedule]) -> None:
    """UserError if detectors would never compare anything, or a teacher would never be refreshed."""
    detectors = None if config.retention is None else config.retention.detectors
    steps = [None if s.source.grows or s.last is None else s.last - s.before for s in schedules]
    if None in steps:  # the end of a stage is not known
        return
    longest, refresh = max(count for count in steps if count is not None), config.teacher.refresh_every
    if detectors is not None and longest < 2 * detectors.window:
        raise UserError(
            f"retention.detectors.window {detectors.window} needs a stage of {2 * detectors.window} steps, and the "
            f"longest has {longest}; lower window, or train for longer"
        )
    if refresh is not None and longest <= refresh:
        raise UserError(
            f"teacher.refresh_every {refresh} is never due: the longest stage has {longest} steps, and its last one "
            f"needs no refresh; lower it, or set teacher.weights: frozen"
        )
