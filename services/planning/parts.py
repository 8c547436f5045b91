"""A process of a run: its resources, and the memory that it is estimated to take."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdft.services.planning.engine_memory import EngineMemory


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

    @property
    def bundle(self) -> dict[str, float]:
        """Its placement group bundle: Ray resources by name."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
