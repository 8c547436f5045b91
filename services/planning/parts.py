"""A process of a run: its resources, and the memory that it is estimated to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sdft.services.planning.engine_memory import WORKSPACE_GIB, EngineMemory


@dataclass(frozen=True)
class Part:
    """One process of the run."""

    name: str
    cpus: float  # Ray CPUs
    gpus: float
    memory_gib: float  # main memory
    labels: Mapping[str, str] = field(default_factory=dict)  # labels of the nodes where it may be placed
    pool: str | None = None  # the key of its settings in `actors`; None: a rank of the learner
    gpu_gib: float = 0.0  # GPU memory; of an engine whose share is of a GPU of unknown size, the least
    engine: EngineMemory | None = None  # of an engine on a GPU
    resting_gib: float = 0.0  # GPU memory of a rank between two steps
    sleeps: bool = False  # an engine that frees its GPU memory while the learner steps

    def held(self, stepping: bool, sleeping: bool) -> float:
        """GPU memory in GiB. stepping: the learner steps. sleeping: engines that sleep do so meanwhile."""
        if self.sleeps and sleeping:
            return WORKSPACE_GIB if stepping else self.gpu_gib
        return self.gpu_gib if stepping or not sleeping or self.pool is not None else self.resting_gib

    @property
    def bundle(self) -> dict[str, float]:
        """Its placement group bundle: Ray resources by name."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def together_gib(parts: Sequence[Part]) -> float:
    """Return the GPU memory that processes on one GPU need at a time.

    With engines that sleep, the larger of what all need while the learner steps, and while the engines compute.
    """
    sleeping = any(part.sleeps for part in parts)
    return max(sum(part.held(stepping, sleeping) for part in parts) for stepping in (True, False))
