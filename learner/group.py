"""All learner ranks as one object. Collectives are called on every rank, the delivery of snapshots on rank 0 only.

If one rank dies or hangs, the group ends the others. Pending calls then raise LearnerLost.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from sdft.actors.gone import DIED, GONE, how_it_ended
from sdft.actors.reaper import end
from sdft.actors.shared.drafts import Draft
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import IntArray, LearnerLost, Process, SampleId, Snapshot
from sdft.actors.shared.waiting import all_within, silent_for, within
from sdft.learner.completions import total
from sdft.learner.model.architecture import Untrainable
from sdft.learner.shares import shares
from sdft.learner.types import LearnerSettings, StepResult
from sdft.learner.worker import learner_actor

HEALTH_EVERY_S = 10  # longest pause between two health checks


class SequencesLost(Exception):
    """Completions or scores of these samples were lost with an engine or a node before the learner had fetched them."""

    def __init__(self, samples: Sequence[SampleId]) -> None:
        super().__init__(f"the completions or scores of {len(samples)} samples were lost with an engine or its node")
        self.samples = samples


class LearnerGroup:
    """The learner ranks. Created by `start`."""

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
        """Start one rank per entry of `options` (Ray actor options) and connect them. Takes 10 to 20 s.

        Raises LearnerLost if one dies during the start, Untrainable if the model cannot be trained. Ranks that did
        start are ended before it raises.
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
        except GONE as error:
            raise LearnerLost(f"a learner process {how_it_ended(error)} while it started") from error
        except RayTaskError as error:
            if isinstance(error.cause, Untrainable):
                raise error.cause from None  # without the worker's traceback: the message is a sentence for the user
            raise
        self._watching = [asyncio.create_task(self._watch(rank)) for rank in range(len(self.workers))]
        for task in self._watching:  # read the exception, so that asyncio does not log it: `_lost` holds the reason
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks, in order."""
        return [process.pid for process in self.processes]

    def kill(self, hangs: bool = False) -> None:
        """End every rank. hangs: some may not answer, so their processes are ended directly too."""
        for task in self._watching:
            task.cancel()
        self._end(hangs)

    def _end(self, hangs: bool) -> None:
        for worker in self.workers:
            ray.kill(worker)
        for process in self.processes if hangs else ():
            end(process)

    async def until_lost(self) -> None:
        """Wait until a rank dies, hangs or is ended, then raise LearnerLost. No other call has to be pending."""
        (ended, *_), _ = await asyncio.wait(self._watching, return_when=asyncio.FIRST_COMPLETED)
        if not ended.cancelled():
            await ended  # raises LearnerLost with the reason
        raise self._reason()

    async def _watch(self, rank: int) -> None:
        """End all ranks when this rank is lost, so that pending calls raise.

        A rank answers in a separate thread, also in the middle of a step.
        """
        worker, patience = self.workers[rank], self._settings.config.health_timeout_s
        how = None
        while how is None:
            await asyncio.sleep(min(HEALTH_EVERY_S, patience / 4))
            try:
                if await silent_for(worker.ping.remote(), patience):
                    how = f"hangs: no answer for {patience:g} s"
            except GONE as error:
                how = how_it_ended(error)
        self._lost = f"learner rank {rank} (process {self.pids[rank]}) {how}"
        self._end(hangs=True)
        raise self._reason()

    async def train_step(self, batch: Sequence[Draft | TrainingSequence]) -> StepResult:
        """Take one optimizer step on a batch.

        Raises SequencesLost, before the step, if a rank cannot fetch its share.
        """
        together = self._settings.config.sequence_parallel  # ranks that divide the tokens of a share
        at_once = together * self._settings.config.tokens_at_once(self._settings.device)
        divided = shares(batch, len(self.workers) // together, at_once)
        lost = await self._each("fetch", "the learner to fetch a batch", [s for s in divided for _ in range(together)])
        if any(lost):
            raise SequencesLost([sample for of_rank in lost for sample in of_rank])
        results: list[StepResult] = await self._all("train_step", "the learner's step")
        return replace(results[0], completions=total([result.completions for result in results[::together]]))

    async def begin_stage(self) -> None:
        """Prepare the first step of a stage. The run's first stage does not need it."""
        await self._all("begin_stage", "the learner to begin a stage")

    async def refresh_teacher(self) -> None:
        """Set the teacher to the student, between two steps."""
        await self._all("refresh_teacher", "the learner to refresh the teacher")

    async def publish(self, role: str, version: int) -> Snapshot:
        """Make a snapshot of a role's weights, and offer it. The role's next snapshot overwrites it."""
        results = await self._all("publish", f"the learner to publish {role} weights v{version}", role, version)
        return results[0]

    async def payload(self, role: str) -> list[ray.ObjectRef]:
        """Put the bytes of the role's last snapshot into Ray's object store, for as long as the reference is held."""
        refs: list[ray.ObjectRef] = await self._first(
            "payload", self._settings.config.step_timeout_s, f"the learner to send {role} weights to other nodes", role
        )
        return refs

    async def sender(self, method: str, seconds: float, what: str, *arguments: Any) -> Any:
        """Call a method of the weight transport's sender, in rank 0."""
        return await self._first("sender", seconds, what, method, *arguments)

    async def save(self, folder: Path) -> None:
        """Begin to write the training state and the student into an existing folder. Steps may run meanwhile."""
        await self._all("save", f"the learner to begin saving into {folder}", str(folder))

    async def written(self) -> None:
        """Wait until all that `save` began is written, though not flushed to the disk."""
        await self._all("written", "the learner to write its checkpoint")

    async def load(self, folder: Path) -> int:
        """Load the state of a saved folder and return its step."""
        results = await self._all("load", f"the learner to load {folder}", str(folder))
        return results[0]

    async def parameters(self, role: str) -> dict[str, Any]:
        """Return all parameters as float32 arrays; for small models."""
        results = await self._all("parameters", f"the learner's {role} parameters", role)
        return results[0]

    async def _first(self, method: str, seconds: float, what: str, *args: Any) -> Any:
        try:
            return await within(getattr(self.workers[0], method).remote(*args), seconds, what)
        except GONE as error:
            raise self._reason(how_it_ended(error)) from error

    async def _all(self, method: str, what: str, *args: Any) -> list[Any]:
        return await self._called([getattr(worker, method).remote(*args) for worker in self.workers], what)

    async def _each(self, method: str, what: str, of_rank: Sequence[Any]) -> list[Any]:
        pairs = zip(self.workers, of_rank, strict=True)
        return await self._called([getattr(worker, method).remote(argument) for worker, argument in pairs], what)

    async def _called(self, calls: list[Any], what: str) -> list[Any]:
        try:
            return await all_within(calls, self._settings.config.step_timeout_s, what)
        except GONE as error:
            raise self._reason(how_it_ended(error)) from error

    def _reason(self, how: str = DIED) -> LearnerLost:
        return LearnerLost(self._lost or f"a learner process (of {', '.join(map(str, self.pids))}) {how}")
