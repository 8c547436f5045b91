"""Environments by name: the built-in ones, and classes of a user's own by import path."""

from sdft.actors.shared.own_code import own_class
from sdft.services.environments.base import Environment

BUILT_IN = {"mcp": "sdft.services.environments.mcp_tools:McpTools"}  # imported when it is used


def environment_class(name: str) -> type[Environment]:
    """Return the class of an environment. Raises NotImportable."""
    return own_class(BUILT_IN.get(name, name), Environment)
