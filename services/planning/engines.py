"""Check the engines and environments of a user's own that a configuration names. It imports their modules."""

from sdft.actors.engine import own_engine
from sdft.actors.shared.own_code import NotImportable, is_own
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.environments.named import environment_class


def check_own_engines(config: RunConfig) -> None:
    """Raise UserError unless every engine of a user's own can be imported and has all methods of the interface."""
    for name, pool in config.actors.pools.items():
        if is_own(pool.engine):
            try:
                own_engine(pool.engine)
            except NotImportable as error:
                raise UserError(f"actors.{name}.engine: {error}") from None


def check_environments(config: RunConfig) -> None:
    """Raise UserError unless every environment can be imported and takes its settings."""
    tasks = [(f"stages[{i}].environment" if config.stages else "environment", t) for i, t in enumerate(config.tasks)]
    named = [(place, task.environment) for place, task in tasks]
    named += [(f"evaluation set {s.name}: environment", s.environment) for s in config.sets]
    for place, environment in named:
        if environment is None:
            continue
        try:
            environment_class(environment.type)(**environment.settings)
        except NotImportable as error:
            raise UserError(f"{place}: {error}") from None
        except Exception as error:  # noqa: BLE001 - a user's code: it can raise anything
            raise UserError(f"{place}.settings: {environment.type} does not take them ({error}); change them") from None
