"""A run's learner, started; a model that it finds it cannot train is the user's to change."""

from collections.abc import Sequence
from typing import Any

from sdft.learner.group import LearnerGroup
from sdft.learner.model.architecture import Untrainable
from sdft.services.base.errors import UserError
from sdft.services.planning.prepare import Prepared, learner_settings


async def start_learner(prepared: Prepared, options: Sequence[dict[str, Any]]) -> LearnerGroup:
    """One rank per entry of `options` (Ray actor options). UserError if the model cannot be trained."""
    try:
        return await LearnerGroup.start(learner_settings(prepared), prepared.probe_ids, options)
    except Untrainable as error:
        raise UserError(f"model: {error}") from None
