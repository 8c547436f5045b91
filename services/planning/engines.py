"""Check the engines and environments of a user's own that a configuration names. It imports their modules."""

import re
import subprocess

from sdft.actors.engine import own_engine
from sdft.actors.shared.own_code import NotImportable, is_own
from sdft.services.base.errors import UserError
from sdft.services.config.environment import EnvironmentConfig
from sdft.services.config.run import RunConfig
from sdft.services.environments.child import START_S, command
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
        if environment.python is not None:
            _check_elsewhere(place, environment)
            continue
        try:
            environment_class(environment.type)(**environment.settings)
        except NotImportable as error:
            raise UserError(f"{place}: {error}") from None
        except Exception as error:  # noqa: BLE001 - a user's code: it can raise anything
            raise UserError(f"{place}.settings: {environment.type} does not take them ({error}); change them") from None


def _check_elsewhere(place: str, environment: EnvironmentConfig) -> None:
    """Make one object of the class in a process of the environment's own interpreter."""
    try:
        done = subprocess.run(command(environment, check=True), capture_output=True, text=True, timeout=START_S)
    except OSError as error:
        raise UserError(f"{place}.python: {environment.python} cannot be started ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{place}: {environment.type} was not made within {START_S:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = re.sub(r"^[\w.]+: ", "", lines[-1])
        raise UserError(f"{place}: {environment.type} cannot be used with {environment.python} ({why})") from None
