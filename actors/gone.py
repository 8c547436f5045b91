"""The errors by which Ray says that the process of an actor is gone, and how it ended.

Most are RayActorError. Ray's memory monitor and the loss of a node have errors of their own.
"""

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

OTHERS = (OutOfMemoryError, NodeDiedError, WorkerCrashedError)
GONE = (RayActorError, *OTHERS)

DIED = "died"
NO_MEMORY = "was ended by Ray, because its node ran out of memory"


def how_it_ended(error: BaseException) -> str:
    """Return how a process ended whose call raised `error`, or an error that it caused."""
    causes = (error, error.__cause__)
    return NO_MEMORY if any(isinstance(cause, OutOfMemoryError) for cause in causes) else DIED
