"""Values that are held where they were made: Ray's references to them, or the values themselves."""

import asyncio
from collections.abc import Sequence
from typing import Any

from ray import ObjectRef
from ray.exceptions import ObjectLostError

from sdft.actors.shared.drafts import CompletionLost


async def fetched(held: Sequence[Any]) -> list[Any]:
    """Return the values, in order. Raises CompletionLost if one was lost with the process or node that held it."""
    try:
        values = iter(await asyncio.gather(*(value for value in held if isinstance(value, ObjectRef))))
    except ObjectLostError as error:
        raise CompletionLost(str(error)) from error
    return [next(values) if isinstance(value, ObjectRef) else value for value in held]
