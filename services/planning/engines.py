"""Check the engines of a user's own that a configuration names. It imports their modules."""

from sdft.actors.engine import own_engine
from sdft.actors.shared.own_code import NotImportable, is_own
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig


def check_own_engines(config: RunConfig) -> None:
    """Raise UserError unless every engine of a user's own can be imported and has all methods of the interface."""
    for name, pool in config.actors.pools.items():
        if is_own(pool.engine):
            try:
                own_engine(pool.engine)
            except NotImportable as error:
                raise UserError(f"actors.{name}.engine: {error}") from None
