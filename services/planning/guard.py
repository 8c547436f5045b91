"""What the detectors of the retention guard need of the schedule: a stage that is long enough to be judged."""

from collections.abc import Sequence

from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.data.schedule import StageSchedule


def check_guard(config: RunConfig, schedules: Sequence[StageSchedule]) -> None:
    """UserError if the detectors would never compare anything."""
    detectors = None if config.retention is None else config.retention.detectors
    steps = [None if s.source.grows or s.last is None else s.last - s.before for s in schedules]
    longest = max((count for count in steps if count is not None), default=0)
    if detectors is not None and None not in steps and longest < 2 * detectors.window:
        raise UserError(
            f"retention.detectors.window {detectors.window} needs a stage of {2 * detectors.window} steps, and the "
            f"longest has {longest}; lower window, or train for longer"
        )
