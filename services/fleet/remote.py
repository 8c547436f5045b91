"""A process elsewhere, as whoever supervises it sees it: its methods can be called, and it can be killed."""

import asyncio
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError

from sdft.actors.reaper import end
from sdft.actors.shared.types import Process


class Remote(Protocol):
    """What an engine's place needs of whoever fills it. The benchmarks simulate one."""

    async def placed(self) -> Process:
        """Where it is, once the cluster has had room for it."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """The method's result, or what it raises; RayActorError if the process is gone, or goes on the way."""

    def kill(self, hangs: bool = False) -> None:
        """End it. `hangs`: it may not answer."""


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
        except ObjectLostError as error:  # it lay on the process's node until somebody fetched it
            raise RayActorError from error
        except asyncio.CancelledError:
            if ray.is_initialized():  # else Ray would connect anew to be told
                ray.cancel(work)
            raise

    def kill(self, hangs: bool = False) -> None:
        ray.kill(self._handle)
        if hangs and self._process is not None:
            end(self._process)
