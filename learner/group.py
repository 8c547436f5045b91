"""All learner ranks as one: every call goes to each of them, since most are collectives."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from actors.types import IntArray, Snapshot
from learner.types import LearnerSettings, StepResult
from learner.waiting import all_within, within
from learner.worker import learner_actor


class LearnerGroup:
    """The ranks. Created by `start`."""

    def __init__(self, workers: Sequence[ActorHandle], settings: LearnerSettings) -> None:
        self.workers = workers
        self._settings = settings
        self.pids: list[int] = []

    @classmethod
    async def start(
        cls, settings: LearnerSettings, probe_ids: IntArray, options: Sequence[dict[str, Any]]
    ) -> "LearnerGroup":
        """Start one rank per entry of `options` (Ray actor options) and let them meet. Takes 10 to 20 s."""
        actor = learner_actor()
        group = cls([actor.options(**o).remote() for o in options], settings)
        timeout = settings.config.start_timeout_s
        address, port = await within(
            group.workers[0].rendezvous.remote(), timeout, "the first learner process to be placed by Ray"
        )
        group.pids = await all_within(
            [
                worker.start.remote(replace(settings, rank=rank), len(options), address, port, probe_ids)
                for rank, worker in enumerate(group.workers)
            ],
            timeout,
            f"{len(options)} learner rank(s) to load {settings.model}",
        )
        return group

    async def train_step(self, samples: Any) -> StepResult:
        """One optimizer step on a batch: a list of ScoredRollout, or a Ray reference to one."""
        results = await self._all("train_step", "the learner's step", samples)
        return results[0]

    async def publish(self, role: str, version: int) -> Snapshot:
        """A snapshot of a role's weights. It stays until `release`."""
        results = await self._all("publish", f"the learner to publish {role} weights v{version}", role, version)
        return results[0]

    async def release(self, role: str) -> None:
        """Every engine has taken the role's last snapshot."""
        await within(self.workers[0].release.remote(role), 60, f"the learner to release {role} weights")

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

    async def _all(self, method: str, what: str, *args: Any) -> list[Any]:
        calls = [getattr(worker, method).remote(*args) for worker in self.workers]
        return await all_within(calls, self._settings.config.step_timeout_s, what)
