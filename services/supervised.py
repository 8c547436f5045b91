"""One engine of a pool, replaced when it dies: its successor takes the same weights and does the lost work again.

A batch's share is enqueued whole in whatever engine does it, with the samples' own seeds, so the result is the same to
the last bit.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.types import Snapshot, UpdateReport
from learner.waiting import within


class SupervisedEngine:
    """The engine that holds a place in a pool, whoever that is at the time."""

    def __init__(
        self,
        name: str,
        create: Callable[[], ActorHandle],
        start_timeout_s: float,
        max_restarts: int,
        notice: Callable[[str], None],
    ) -> None:
        """name: "teacher engine 0". create: makes an actor in this place. notice: is told what happens to it."""
        self.name = name
        self.pid = 0
        self._create = create
        self._start_timeout_s, self._max_restarts = start_timeout_s, max_restarts
        self._notice = notice
        self._actor = create()
        self._deaths = 0
        self._replacing = asyncio.Lock()
        self._snapshot: tuple[Snapshot, float] | None = None

    async def start(self) -> None:
        """Load the model, in 15 to 40 s."""
        self.pid = await within(self._actor.start.remote(), self._start_timeout_s, f"{self.name} to load its model")

    async def call(self, what: str, timeout_s: float, method: str, *arguments: Any) -> Any:
        """The result of an actor's method, by a successor if it dies on the way. RuntimeError if too many have died."""
        while True:
            actor = self._actor
            try:
                return await within(getattr(actor, method).remote(*arguments), timeout_s, f"{self.name} {what}")
            except RayActorError as error:
                await self._replace(actor, error)

    async def update_weights(self, snapshot: Snapshot, timeout_s: float) -> UpdateReport:
        """Load a snapshot, which must stay as it is until the next one is loaded."""
        self._snapshot = snapshot, timeout_s
        what = f"to load {snapshot.role} weights v{snapshot.version}"
        return await self.call(what, timeout_s, "update_weights", snapshot)

    async def stop(self) -> None:
        """Shut it down; killed if it does not answer within 20 s."""
        await asyncio.wait([asyncio.wrap_future(self._actor.stop.remote().future())], timeout=20)
        ray.kill(self._actor)

    async def _replace(self, dead: ActorHandle, error: RayActorError) -> None:
        async with self._replacing:
            if self._actor is not dead:
                return  # by another call, which lost its work too
            while True:
                self._deaths += 1
                if self._deaths > self._max_restarts:
                    raise RuntimeError(
                        f"{self.name} has died {self._deaths} times (actors.*.max_restarts: {self._max_restarts}); "
                        f"the last time: {error}"
                    ) from error
                self._notice(f"{self.name} (process {self.pid}) died; another takes its place")
                await asyncio.sleep(2 ** (self._deaths - 1) - 1)
                ray.kill(self._actor)
                self._actor = self._create()
                try:
                    await self.start()
                    if self._snapshot is not None:
                        snapshot, timeout_s = self._snapshot
                        what = f"{self.name}, newly started, to load {snapshot.role} weights v{snapshot.version}"
                        await within(self._actor.update_weights.remote(snapshot), timeout_s, what)
                except RayActorError as again:
                    error = again
                    continue
                self._notice(f"{self.name} is back (process {self.pid})")
                return
