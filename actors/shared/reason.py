"""The reason of a failure in one line."""

import re

from ray.exceptions import RayActorError

LONGEST_REASON = 240  # characters
CREATION_TASK = "creation task"  # in Ray's message for an actor whose __init__ raised
NUMBERS = re.compile(r"(class_name|actor_id|pid|name|namespace|ip): ")


def reason(error: BaseException) -> str:
    """Return the reason of a failure in one line.

    Ray wraps an exception of an actor into a text with its whole traceback, and puts the reason of a death below a list
    of the actor's names and numbers.
    """
    cause = getattr(error, "cause", None) or error
    # The text of a KeyError is only the key.
    text = f"{type(cause).__name__}: {cause}" if isinstance(cause, LookupError) else str(cause)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, RayActorError) and lines and CREATION_TASK in lines[0]:
        return lines[-1]  # below the traceback
    if isinstance(error, RayActorError) and len(lines) > 1:
        death = " ".join(line for line in lines[1:] if not NUMBERS.match(line))
        return death if len(death) <= LONGEST_REASON else death[:LONGEST_REASON].rpartition(" ")[0] + " …"
    return lines[0] if lines else type(cause).__name__
