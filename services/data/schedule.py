"""Which samples each optimizer step trains on: a pure function of the configuration and of the source's records."""

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sdft.actors.shared.types import SampleId
from sdft.services.config.run import TaskConfig
from sdft.services.data.sources.base import PromptSource
from sdft.services.records.ledger import Drawn


@dataclass(frozen=True)
class StageSchedule:
    """The prompts of a stage, cut into batches. The last batch may be short.

    A fixed source is reshuffled each epoch, and a batch may span two epochs. A growing source is taken in its order,
    each record once, in epoch 0: a batch is ready once all its records are known, or the source is closed.
    """

    source: PromptSource
    batch_size: int  # prompts
    generations: int  # rollouts per prompt
    seed: int
    limit: int | None  # prompts of the whole stage, at most; None: all that a growing source gives until it is closed
    stage: int = 0
    before: int = 0  # optimizer steps of all earlier stages

    @property
    def prompts(self) -> int | None:
        """Prompts of the whole stage; of a source that is not closed, at most so many. None: not known yet."""
        if not self.source.grows or not self.source.closed:
            return self.limit
        return min(self.source.known, self.limit or sys.maxsize)

    @property
    def last(self) -> int | None:
        """Last optimizer step of the stage; the first is before + 1. None: not known yet."""
        return None if self.prompts is None else self.before - (-self.prompts // self.batch_size)

    @property
    def end_is_known(self) -> bool:
        """Whether all records of the stage are known."""
        return self.source.closed or (self.limit is not None and self.source.known >= self.limit)

    def needed(self, step: int) -> int:
        """Return how many records of a growing source must be known for the batch of a step to be whole; else 0."""
        return min((step - self.before) * self.batch_size, self.limit or sys.maxsize) if self.source.grows else 0

    def is_ready(self, step: int) -> bool:
        """Return whether the stage has `step` and its records are known. Looks for new records, without waiting."""
        needed = self.needed(step)
        self.source.read(needed)
        return (self.last is None or step <= self.last) and (self.source.known >= needed or self.source.closed)

    def batch(self, step: int) -> list[SampleId]:
        """Return the samples of optimizer step `step`, whose records must be known. The last batch may be short."""
        generations = range(self.generations)
        return [SampleId(self.stage, epoch, i, g) for epoch, i in self._records(step) for g in generations]

    def drawn(self, step: int) -> list[Drawn]:
        """Return the records that a growing source gives to the batch of `step`; none of a fixed source."""
        source = self.source
        positions = self._positions(step) if source.grows else ()
        return [Drawn(self.stage, i, source.records[i].where, source.digest(i)) for i in positions]

    def issued_through(self, step: int) -> dict[tuple[int, int], int]:
        """Count the stage's samples up to and including `step`, by (stage, epoch)."""
        issued = max(0, min((step - self.before) * self.batch_size, self._end))
        records = issued if self.source.grows else self.source.known
        whole, rest = divmod(issued, records) if issued else (0, 0)
        prompts = [records] * whole + ([rest] if rest else [])
        return {(self.stage, epoch): count * self.generations for epoch, count in enumerate(prompts)}

    @property
    def _end(self) -> int:
        return sys.maxsize if self.prompts is None else self.prompts

    def _positions(self, step: int) -> range:
        first = (step - self.before - 1) * self.batch_size
        return range(first, min(first + self.batch_size, self._end))

    def _records(self, step: int) -> Iterator[tuple[int, int]]:
        """Yield epoch and index of each prompt of a step."""
        positions, known = self._positions(step), self.source.known
        if self.source.grows:
            yield from ((0, position) for position in positions)
            return
        for epoch in range(positions.start // known, -(-positions.stop // known)):
            order, first = _order(known, f"{self.seed}/{self.stage}/{epoch}"), epoch * known
            places = range(max(positions.start - first, 0), min(positions.stop - first, known))
            yield from ((epoch, order[place]) for place in places)


@dataclass(frozen=True)
class Schedule:
    """The stages of a run in sequence. Steps are counted from 1 across all stages."""

    stages: tuple[StageSchedule, ...]

    @property
    def total_steps(self) -> int | None:
        """Steps of the run; of a source that is not closed, at most so many. None: not known yet."""
        return self.stages[-1].last

    def has(self, step: int) -> bool:
        """Return whether the run has optimizer step `step`, or may still have it."""
        return self.total_steps is None or step <= self.total_steps

    def at(self, step: int) -> StageSchedule:
        """Return the stage of optimizer step `step`; the first stage for step 0."""
        return next(stage for stage in self.stages if stage.last is None or step <= stage.last)

    def batch(self, step: int) -> list[SampleId]:
        """Return the samples of optimizer step `step`."""
        return self.at(step).batch(step)

    def issued_through(self, step: int) -> dict[tuple[int, int], int]:
        """Count the samples of all steps up to and including `step`, by (stage, epoch)."""
        return {key: count for stage in self.stages for key, count in stage.issued_through(step).items()}


@lru_cache(maxsize=4)  # a batch usually spans one or two epochs
def _order(records: int, seed: str) -> list[int]:
    """Return the indices of all rows, shuffled by `seed`."""
    order = list(range(records))
    random.Random(seed).shuffle(order)
    return order


def make_schedule(tasks: Sequence[TaskConfig], sources: Sequence[PromptSource]) -> Schedule:
    """Make the schedule of a run. sources: of each task."""
    stages: list[StageSchedule] = []
    for task, source in zip(tasks, sources, strict=True):
        t = task.training
        limit = None if t.steps is None else t.batch_size * t.steps
        if t.epochs is not None:
            limit = source.known * t.epochs
        # Only the last stage may have an unknown end: prepare.py checks it.
        before = (stages[-1].last or 0) if stages else 0
        stages.append(
            StageSchedule(source, t.batch_size, task.sampling.generations, task.seed, limit, len(stages), before)
        )
    return Schedule(tuple(stages))


def sample_seed(run_seed: int, sample: SampleId) -> int:
    """Return the sampling seed of one sample. It does not depend on the engine or the time of sampling."""
    return seed_of(f"{run_seed}/{sample}")


def seed_of(name: str) -> int:
    """Derive a 63-bit sampling seed from a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
