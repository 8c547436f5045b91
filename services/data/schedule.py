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
    """Demonstrations in a new order each epoch, cut into batches of prompts; a batch may reach into the next epoch."""

    demonstrations: int
    batch_size: int  # prompts
    generations: int  # rollouts per prompt
    seed: int
    prompts: int  # prompts of the whole stage
    stage: int = 0
    before: int = 0  # optimizer steps of the stages before it

    @property
    def last(self) -> int:
        """Its last optimizer step; its first is before + 1."""
        return self.before + -(-self.prompts // self.batch_size)

    def batch(self, step: int) -> list[SampleId]:
        """Samples of optimizer step `step`. The last batch may be short."""
        first = (step - self.before - 1) * self.batch_size
        samples = []
        for position in range(first, min(first + self.batch_size, self.prompts)):
            epoch, place = divmod(position, self.demonstrations)
            index = _order(self.demonstrations, f"{self.seed}/{self.stage}/{epoch}")[place]
            samples += [SampleId(self.stage, epoch, index, g) for g in range(self.generations)]
        return samples

    def issued_through(self, step: int) -> dict[tuple[int, int], int]:
        """Samples of its steps up to and including `step`, by (stage, epoch)."""
        issued = max(0, min((step - self.before) * self.batch_size, self.prompts))
        whole, rest = divmod(issued, self.demonstrations)
        prompts = [self.demonstrations] * whole + ([rest] if rest else [])
        return {(self.stage, epoch): count * self.generations for epoch, count in enumerate(prompts)}


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, one after the other; steps are counted from 1 through all of them."""

    stages: tuple[StageSchedule, ...]

    @property
    def total_steps(self) -> int:
        return self.stages[-1].last

    def at(self, step: int) -> StageSchedule:
        """The stage that optimizer step `step` is in; of step 0, before the first, the first."""
        return next(stage for stage in self.stages if step <= stage.last)

    def batch(self, step: int) -> list[SampleId]:
        """Samples of optimizer step `step`."""
        return self.at(step).batch(step)

    def issued_through(self, step: int) -> dict[tuple[int, int], int]:
        """Samples of all steps up to and including `step`, by (stage, epoch)."""
        return {key: count for stage in self.stages for key, count in stage.issued_through(step).items()}


@lru_cache(maxsize=4)  # a batch is of one epoch or two, and its samples ask one after the other
def _order(demonstrations: int, seed: str) -> list[int]:
    """All rows, shuffled."""
    order = list(range(demonstrations))
    random.Random(seed).shuffle(order)
    return order


def make_schedule(tasks: Sequence[TaskConfig], demonstrations: Sequence[int]) -> Schedule:
    """The schedule of a run over its tasks, which have so many demonstrations."""
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
    """The sampling seed of one sample: it does not depend on which engine makes it, or when."""
    return seed_of(f"{run_seed}/{sample}")


def seed_of(name: str) -> int:
    """A sampling seed for whatever has this name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
