"""A remote process as its supervisor uses it: call its methods, kill it."""

import asyncio
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError

from sdft.actors.gone import OTHERS
from sdft.actors.reaper import end
from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import Process


class Remote(Protocol):
    """The interface of an engine's process or a relay. The benchmarks simulate one."""

    async def placed(self) -> Process:
        """Return its process id and node, once the cluster has placed it."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """Return the method's result or raise its error; RayActorError if the process is dead or dies meanwhile."""

    def kill(self, hangs: bool = False) -> None:
        """End the process. hangs: it may not answer."""


class RemoteActor:
    """A Ray actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle
        self._process: Process | None = None

    async def placed(self) -> Process:
        self._process = await self._handle.where.remote()
        return self._process

    async def call(self, method: str, *arguments: Any) -> Any:
        work = getattr(self._handle, method).remote(*arguments)
        try:
            return await work
        except (ObjectLostError, *OTHERS) as error:  # lost: the result, with the process's node before it was fetched
            raise RayActorError(error_msg=reason(error)) from error
        except asyncio.CancelledError:
            if ray.is_initialized():  # else ray.cancel would connect anew
                ray.cancel(work)
            raise

    def kill(self, hangs: bool = False) -> None:
        ray.kill(self._handle)
        if hangs and self._process is not None:
            end(self._process)
