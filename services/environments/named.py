"""Environments by name: the built-in ones, and classes of a user's own by import path."""

from sdft.actors.shared.own_code import own_class
from sdft.services.environments.base import Environment

BUILT_IN = {  # imported when they are used
    "mcp": "sdft.services.environments.mcp_tools:McpTools",
    "verifiers": "sdft.services.environments.verifiers_environment:Verifiers",
}


def environment_class(name: str) -> type[Environment]:
    """Return the class of an environment. Raises NotImportable."""
    return own_class(BUILT_IN.get(name, name), Environment)
