"""Ray's authentication token. Imports no ray, which reads RAY_AUTH_MODE when it is imported."""

import os
from pathlib import Path

IN_HOME = "~/.ray/auth_token"


def has_token() -> bool:
    """Return whether Ray takes a token from the environment or the home folder. An empty variable counts as unset.

    True if RAY_AUTH_TOKEN_PATH names a file that cannot be read: Ray refuses to start then, and says so.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    try:
        return bool(Path(IN_HOME).expanduser().read_text().strip())
    except (OSError, RuntimeError):  # RuntimeError: an unknown user without HOME
        return False
