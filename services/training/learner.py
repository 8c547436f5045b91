"""Start of a run's learner. A model that cannot be trained is a UserError."""

from collections.abc import Sequence
from typing import Any

from sdft.learner.group import LearnerGroup
from sdft.learner.model.architecture import Untrainable
from sdft.services.base.errors import UserError
from sdft.services.planning.prepared import Prepared, learner_settings


async def start_learner(prepared: Prepared, options: Sequence[dict[str, Any]]) -> LearnerGroup:
    """Start one rank per entry of `options` (Ray actor options). UserError if the model cannot be trained."""
    try:
        return await LearnerGroup.start(learner_settings(prepared), prepared.probe_ids, options)
    except Untrainable as error:
        raise UserError(f"model: {error}") from None
