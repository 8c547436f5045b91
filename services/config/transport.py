"""Check that a user's own weight transport can be imported."""

from sdft.actors.shared.own_code import NotImportable, is_own
from sdft.actors.transport.named import transport_class
from sdft.services.base.errors import UserError
from sdft.services.config.sections import WeightsConfig


def check_transport(weights: WeightsConfig) -> None:
    """Raise UserError if weights.transport names a class that cannot be imported or is no transport."""
    if is_own(weights.transport):
        try:
            transport_class(weights.transport)
        except NotImportable as error:
            raise UserError(f"weights.transport: {error}") from None
