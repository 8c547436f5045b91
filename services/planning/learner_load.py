"""What a run gives a learner rank to compute at most, and the memory that it takes, also with other settings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sdft.actors.shared.changes import MOST
from sdft.actors.shared.process import GIB
from sdft.learner.config import LearnerConfig
from sdft.services.config.run import RunConfig, TaskConfig
from sdft.services.planning.gpu_memory import Forward, learner_gpu_gib, resting_gpu_gib
from sdft.services.planning.memory import WIDTH, learner_beside_gpu_gib, learner_gib, packed_bytes
from sdft.services.planning.shape import ModelShape
from sdft.services.planning.supports import width

ADAPTED_PER_ADAPTER = 50  # weights for each parameter of adapters of rank 16, at least (70 at 1.5B, 160 at 7B)


@dataclass(frozen=True)
class LearnerLoad:
    """The tasks of a run with its model."""

    config: RunConfig
    shape: ModelShape
    longest_prompts: Sequence[int]  # tokens of the longest student prompt of each task

    @cached_property
    def scored(self) -> list[tuple[int, int]]:
        """Of each task (loss tokens of a step with completions of full length, tokens of the support at each)."""
        return [(_rows_of_step(task), width(task, self.shape.vocabulary)) for task in self.config.tasks]

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._sequences)

    @property
    def rollouts(self) -> int:
        """Rollouts of the task with the fewest in a step."""
        return min(map(_rollouts, self.config.tasks))

    def memory_gib(self, further: int) -> float:
        """Estimate the main memory of the first rank. further: as in learner_gib."""
        learner, dtype, cuda = self.config.learner, self.config.dtype, self.config.device == "cuda"
        teacher, stages = self.config.teacher_in_use.of_learner, len(self.config.tasks)
        found = []
        for task, sequence, (rows, wide) in zip(self.config.tasks, self._sequences, self.scored, strict=True):
            together = learner.sequence_parallel
            share = -(-rows * together // learner.ranks)
            if cuda:
                found.append(learner_beside_gpu_gib(learner, teacher, dtype, self.shape, stages, further, wide, share))
                continue
            most = -(-_rollouts(task) * together // learner.ranks)
            sequences = max(1, min(most, together * learner.tokens_at_once("cpu") // sequence))
            of_rank = -(-sequences // together)  # whose loss it computes
            forward = -(-sequences * sequence // together), of_rank * task.longest_reply, sequence
            found.append(learner_gib(learner, teacher, dtype, self.shape, *forward, stages, further, wide, share))
        return max(found) + self._compared_gib(further)

    def _compared_gib(self, further: int) -> float:
        """GiB of the versions that other nodes have, which weights.transport changes compares new ones with."""
        if self.config.weights.transport != "changes":
            return 0
        c = self.config
        packed = packed_bytes(c.learner, c.teacher_in_use.of_learner, c.dtype, self.shape, further)
        return (1 + 3 * MOST) * packed / GIB  # the changes exist in pieces, joined, and in the object store

    def gpu_gib(self, learner: LearnerConfig) -> float:
        """Estimate the GPU memory of a rank with these settings of the learner."""
        teacher, stages, dtype = self.config.teacher_in_use.of_learner, len(self.config.tasks), self.config.dtype
        shape = self.shape if learner.lora == self.config.learner.lora else _with_adapters(self.shape)
        found = []
        for task, sequence, (_, wide) in zip(self.config.tasks, self._sequences, self.scored, strict=True):
            # Shorter sequences fill a micro-batch to its size.
            together = learner.sequence_parallel
            share = -(-_rollouts(task) * together // learner.ranks) * sequence
            tokens = max(sequence, min(share, together * learner.tokens_at_once("cuda")))
            alone = share <= tokens and len(task.method.losses) == 1  # sequences of two losses are not packed together
            rows = max(task.longest_reply, -(-tokens * task.longest_reply // sequence // together))
            forward = Forward(-(-tokens // together), rows, wide, alone)
            found.append(learner_gpu_gib(learner, teacher, dtype, shape, forward, stages))
        return max(found) + self._buffers_gib

    def resting_gib(self, learner: LearnerConfig) -> float:
        """Estimate the GPU memory of a rank between two steps."""
        teacher, stages = self.config.teacher_in_use.of_learner, len(self.config.tasks)
        return resting_gpu_gib(learner, teacher, self.config.dtype, self.shape, stages) + self._buffers_gib

    @property
    def _buffers_gib(self) -> float:
        """GiB of snapshots on the GPU of the first rank: one for each role that gets weights."""
        if self.config.weights.transport != "ipc":
            return 0
        roles = 1 if self.config.teacher_in_use.of_learner.weights == "live" else 2
        return roles * WIDTH[self.config.dtype] * self.shape.parameters / GIB

    @property
    def _sequences(self) -> list[int]:
        """Tokens of each task's longest sequence: completions have their full length."""
        return [p + task.longest_reply for task, p in zip(self.config.tasks, self.longest_prompts, strict=True)]


def _rollouts(task: TaskConfig) -> int:
    return task.training.batch_size * task.sampling.generations


def _rows_of_step(task: TaskConfig) -> int:
    return _rollouts(task) * task.longest_reply


def _with_adapters(shape: ModelShape) -> ModelShape:
    """Return about the shape with adapters on all layers, of a run that has none."""
    adapted = shape.parameters - shape.embeddings
    return replace(shape, adapted=adapted, adapters=adapted // ADAPTED_PER_ADAPTER)
