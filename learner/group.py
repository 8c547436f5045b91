"""All learner ranks as one: every call goes to each of them, since most are collectives.

One rank that dies or hangs takes the others with it: whatever is waited for then raises LearnerLost.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from sdft.actors.reaper import end
from sdft.actors.shared.types import IntArray, Process, ScoredRollout, Snapshot
from sdft.actors.shared.waiting import all_within, silent_for, within
from sdft.learner.model.architecture import Untrainable
from sdft.learner.types import LearnerSettings, StepResult
from sdft.learner.worker import learner_actor

HEALTH_EVERY_S = 10  # at most


class LearnerLost(Exception):
    """A rank has died, or answers no more. What was trained since the last checkpoint is gone with it."""


class LearnerGroup:
    """The ranks. Created by `start`."""

    def __init__(self, workers: Sequence[ActorHandle], settings: LearnerSettings) -> None:
        self.workers = workers
        self._settings = settings
        self.processes: list[Process] = []
        self._lost: str | None = None
        self._watching: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls, settings: LearnerSettings, probe_ids: IntArray, options: Sequence[dict[str, Any]]
    ) -> "LearnerGroup":
        """Start one rank per entry of `options` (Ray actor options) and let them meet. Takes 10 to 20 s.

        LearnerLost if one dies on the way, Untrainable if the model cannot be trained. Ranks that did start are gone
        when this raises.
        """
        actor = learner_actor(settings.device)
        group = cls([actor.options(**o).remote() for o in options], settings)
        try:
            await group._start(probe_ids)
        except BaseException:
            group.kill(hangs=True)
            raise
        return group

    async def _start(self, probe_ids: IntArray) -> None:
        settings, timeout = self._settings, self._settings.config.start_timeout_s
        try:
            self.processes = await all_within(
                [worker.where.remote() for worker in self.workers],
                timeout,
                "the learner's processes to be placed by Ray",
            )
            address, port = await within(
                self.workers[0].rendezvous.remote(), timeout, "the first learner process to find a port"
            )
            await all_within(
                [
                    worker.start.remote(replace(settings, rank=rank), len(self.workers), address, port, probe_ids)
                    for rank, worker in enumerate(self.workers)
                ],
                timeout,
                f"{len(self.workers)} learner rank(s) to load {settings.model}",
            )
        except RayActorError as error:
            raise LearnerLost("a learner process died while it started") from error
        except RayTaskError as error:
            if isinstance(error.cause, Untrainable):
                raise error.cause from None  # without the trace of another process: it is a sentence for the user
            raise
        self._watching = [asyncio.create_task(self._watch(rank)) for rank in range(len(self.workers))]
        for task in self._watching:  # its words are in `_lost` too: nobody has to wait for them
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    @property
    def pids(self) -> list[int]:
        """Of the ranks' processes, in order."""
        return [process.pid for process in self.processes]

    def kill(self, hangs: bool = False) -> None:
        """End every rank. `hangs`: some may not answer."""
        for task in self._watching:
            task.cancel()
        self._end(hangs)

    def _end(self, hangs: bool) -> None:
        for worker in self.workers:
            ray.kill(worker)
        for process in self.processes if hangs else ():
            end(process)

    async def until_lost(self) -> None:
        """Raises LearnerLost once a rank has died, hangs or was ended, also while nobody waits for its work."""
        (ended, *_), _ = await asyncio.wait(self._watching, return_when=asyncio.FIRST_COMPLETED)
        if not ended.cancelled():
            await ended  # raises why
        raise self._reason()

    async def _watch(self, rank: int) -> None:
        """When this rank is lost, end all of them, so that those who wait for them hear of it.

        It answers in a thread of its own, also in the middle of a step.
        """
        worker, patience = self.workers[rank], self._settings.config.health_timeout_s
        how = None
        while how is None:
            await asyncio.sleep(min(HEALTH_EVERY_S, patience / 4))
            try:
                if await silent_for(worker.answer.remote(), patience):
                    how = f"hangs: no answer for {patience:g} s"
            except RayActorError:
                how = "died"
        self._lost = f"learner rank {rank} (process {self.pids[rank]}) {how}"
        self._end(hangs=True)
        raise self._reason()

    async def train_step(self, samples: Sequence[ScoredRollout]) -> StepResult:
        """One optimizer step on a batch."""
        results = await self._all("train_step", "the learner's step", ray.put(samples))
        return results[0]

    async def begin_stage(self) -> None:
        """Before the first step of a stage but the run's first."""
        await self._all("begin_stage", "the learner to begin a stage")

    async def publish(self, role: str, version: int) -> Snapshot:
        """A snapshot of a role's weights. It stays until `release`."""
        results = await self._all("publish", f"the learner to publish {role} weights v{version}", role, version)
        return results[0]

    async def release(self, role: str) -> None:
        """Every engine has taken the role's last snapshot."""
        await self._first("release", 60, f"the learner to release {role} weights", role)

    async def payload(self, role: str) -> list[ray.ObjectRef]:
        """The bytes of the role's last snapshot in Ray's object store, for as long as the reference is held."""
        refs: list[ray.ObjectRef] = await self._first(
            "payload", self._settings.config.step_timeout_s, f"the learner to send {role} weights to other nodes", role
        )
        return refs

    async def meet(self, role: str) -> tuple[str, int]:
        """Address and port at which the next group for broadcasts to the role's engines meets."""
        place: tuple[str, int] = await self._first("meet", 60, "the learner to find a port", role)
        return place

    async def join(self, role: str, size: int, timeout_s: float) -> None:
        """Returns when all members of that group are there, `size` with the learner."""
        await self._first("join", 2 * timeout_s, f"{size - 1} {role} engines to meet", role, size, timeout_s)

    async def send(self, role: str, timeout_s: float) -> None:
        """Broadcast the role's last snapshot to them."""
        await self._first("send", 2 * timeout_s, f"the learner to broadcast {role} weights", role, timeout_s)

    async def save(self, folder: Path) -> None:
        """Begin to write the training state and the student into an existing folder; steps may go on meanwhile."""
        await self._all("save", f"the learner to begin saving into {folder}", str(folder))

    async def written(self) -> None:
        """What `save` began is written, though not flushed to the disk."""
        await self._all("written", "the learner to write its checkpoint")

    async def load(self, folder: Path) -> int:
        """Continue from a saved folder; returns its step."""
        results = await self._all("load", f"the learner to load {folder}", str(folder))
        return results[0]

    async def parameters(self, role: str) -> dict[str, Any]:
        """All parameters as float32 arrays; for small models."""
        results = await self._all("parameters", f"the learner's {role} parameters", role)
        return results[0]

    async def _first(self, method: str, seconds: float, what: str, *args: Any) -> Any:
        try:
            return await within(getattr(self.workers[0], method).remote(*args), seconds, what)
        except RayActorError as error:
            raise self._reason() from error

    async def _all(self, method: str, what: str, *args: Any) -> list[Any]:
        calls = [getattr(worker, method).remote(*args) for worker in self.workers]
        try:
            return await all_within(calls, self._settings.config.step_timeout_s, what)
        except RayActorError as error:
            raise self._reason() from error

    def _reason(self) -> LearnerLost:
        return LearnerLost(self._lost or f"a learner process (of {', '.join(map(str, self.pids))}) died")
