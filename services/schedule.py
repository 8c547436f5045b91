"""Which samples each optimizer step trains on: a pure function of the configuration."""

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache

from actors.types import SampleId


@dataclass(frozen=True)
class Schedule:
    """Demonstrations in a new order each epoch, cut into batches of prompts; a batch may reach into the next epoch."""

    demonstrations: int
    batch_size: int  # prompts
    generations: int  # rollouts per prompt
    seed: int
    prompts: int  # prompts of the whole run
    stage: int = 0

    @property
    def total_steps(self) -> int:
        return -(-self.prompts // self.batch_size)

    def batch(self, step: int) -> list[SampleId]:
        """Samples of optimizer step `step`, counted from 1. The last batch may be short."""
        first = (step - 1) * self.batch_size
        samples = []
        for position in range(first, min(first + self.batch_size, self.prompts)):
            epoch, place = divmod(position, self.demonstrations)
            index = _order(self.demonstrations, f"{self.seed}/{self.stage}/{epoch}")[place]
            samples += [SampleId(self.stage, epoch, index, g) for g in range(self.generations)]
        return samples

    def issued_through(self, step: int) -> dict[tuple[int, int], int]:
        """Samples of all steps up to and including `step`, by (stage, epoch)."""
        whole, rest = divmod(min(step * self.batch_size, self.prompts), self.demonstrations)
        prompts = [self.demonstrations] * whole + ([rest] if rest else [])
        return {(self.stage, epoch): count * self.generations for epoch, count in enumerate(prompts)}


@lru_cache(maxsize=4)  # a batch is of one epoch or two, and its samples ask one after the other
def _order(demonstrations: int, seed: str) -> list[int]:
    """All rows, shuffled."""
    order = list(range(demonstrations))
    random.Random(seed).shuffle(order)
    return order


def make_schedule(
    demonstrations: int, batch_size: int, generations: int, seed: int, epochs: int | None, steps: int | None
) -> Schedule:
    """The schedule of a run over whole `epochs`, or of a number of `steps`."""
    prompts = demonstrations * epochs if epochs is not None else batch_size * (steps or 0)
    return Schedule(demonstrations, batch_size, generations, seed, prompts)


def sample_seed(run_seed: int, sample: SampleId) -> int:
    """The sampling seed of one sample: it does not depend on which engine makes it, or when."""
    return seed_of(f"{run_seed}/{sample}")


def seed_of(name: str) -> int:
    """A sampling seed for whatever has this name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
