"""A process elsewhere, as whoever supervises it sees it: its methods can be called, and it can be killed."""

import asyncio
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle


class Remote(Protocol):
    """What an engine's place needs of whoever fills it. The benchmarks simulate one."""

    async def placed(self) -> None:
        """Returns once there is a process: the cluster had room for it."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """The method's result, or what it raises; RayActorError if the process is gone, or goes on the way."""

    def kill(self) -> None:
        """End it, also if it hangs."""


class RemoteActor:
    """A Ray actor."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    async def placed(self) -> None:
        await self._handle.__ray_ready__.remote()

    async def call(self, method: str, *arguments: Any) -> Any:
        work = getattr(self._handle, method).remote(*arguments)
        try:
            return await work
        except asyncio.CancelledError:
            ray.cancel(work)
            raise

    def kill(self) -> None:
        ray.kill(self._handle)  # seen to by its node's Ray, also if the process was stopped
