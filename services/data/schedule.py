"""Which samples each optimizer step trains on: a pure function of the configuration."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sdft.actors.shared.types import SampleId
from sdft.services.config.run import TaskConfig


@dataclass(frozen=True)
class StageSchedule:
    """Demonstrations, reshuffled each epoch and cut into batches of prompts. A batch may span two epochs."""

    demonstrations: int
    batch_size: int  # prompts
    generations: int  # rollouts per prompt
    seed: int
    prompts: int  # prompts of the whole stage
    stage: int = 0
    before: int = 0  # optimizer steps of all earlier stages

    @property
    def last(self) -> int:
        """Last optimizer step of the stage; the first is before + 1."""
        return self.before + -(-self.prompts // self.batch_size)

    def batch(self, step: int) -> list[SampleId]:
        """Return the samples of optimizer step `step`. The last batch may be short."""
        first = (step - self.before - 1) * self.batch_size
        samples = []
        for position in range(first, min(first + self.batch_size, self.prompts)):
            epoch, place = divmod(position, self.demonstrations)
            index = _order(self.demonstrations, f"{self.seed}/{self.stage}/{epoch}")[place]
            samples += [SampleId(self.stage, epoch, index, g) for g in range(self.generations)]
        return samples

    def issued_through(self, step: int) -> dict[tuple[int, int], int]:
        """Count the stage's samples up to and including `step`, by (stage, epoch)."""
        issued = max(0, min((step - self.before) * self.batch_size, self.prompts))
        whole, rest = divmod(issued, self.demonstrations)
        prompts = [self.demonstrations] * whole + ([rest] if rest else [])
        return {(self.stage, epoch): count * self.generations for epoch, count in enumerate(prompts)}


@dataclass(frozen=True)
class Schedule:
    """The stages of a run in sequence. Steps are counted from 1 across all stages."""

    stages: tuple[StageSchedule, ...]

    @property
    def total_steps(self) -> int:
        return self.stages[-1].last

    def at(self, step: int) -> StageSchedule:
        """Return the stage of optimizer step `step`; the first stage for step 0."""
        return next(stage for stage in self.stages if step <= stage.last)

    def batch(self, step: int) -> list[SampleId]:
        """Return the samples of optimizer step `step`."""
        return self.at(step).batch(step)

    def issued_through(self, step: int) -> dict[tuple[int, int], int]:
        """Count the samples of all steps up to and including `step`, by (stage, epoch)."""
        return {key: count for stage in self.stages for key, count in stage.issued_through(step).items()}


@lru_cache(maxsize=4)  # a batch usually spans one or two epochs; batch() calls this once per prompt
def _order(demonstrations: int, seed: str) -> list[int]:
    """Return the indices of all rows, shuffled by `seed`."""
    order = list(range(demonstrations))
    random.Random(seed).shuffle(order)
    return order


def make_schedule(tasks: Sequence[TaskConfig], demonstrations: Sequence[int]) -> Schedule:
    """Make the schedule of a run. demonstrations: the number of demonstrations of each task."""
    stages: list[StageSchedule] = []
    for task, rows in zip(tasks, demonstrations, strict=True):
        t = task.training
        prompts = rows * t.epochs if t.epochs is not None else t.batch_size * (t.steps or 0)
        before = stages[-1].last if stages else 0
        stages.append(
            StageSchedule(rows, t.batch_size, task.sampling.generations, task.seed, prompts, len(stages), before)
        )
    return Schedule(tuple(stages))


def sample_seed(run_seed: int, sample: SampleId) -> int:
    """Return the sampling seed of one sample. It does not depend on the engine or the time of sampling."""
    return seed_of(f"{run_seed}/{sample}")


def seed_of(name: str) -> int:
    """Derive a 63-bit sampling seed from a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
