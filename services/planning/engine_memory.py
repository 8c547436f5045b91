"""Estimate of the GPU memory of an engine: its weights, a workspace and the KV cache.

The workspace is an assumption: CUDA's context, CUDA graphs, and the larger of one prefill's activations and the logits
of the rows that are scored at once. vLLM itself measures what its prefill takes, and gives the rest of its share of the
card to the cache.
"""

from dataclasses import dataclass

from sdft.actors.config import PREFILL, SCORED_AT_ONCE, PoolConfig
from sdft.actors.shared.process import GIB
from sdft.services.planning.memory import WIDTH
from sdft.services.planning.shape import ModelShape

WORKSPACE_GIB = 1.2  # CUDA's context, loaded kernels, CUDA graphs of the decoding steps
ALONE = 0.9  # share of a GPU of its own, of which the rest is for what vLLM does not count


@dataclass(frozen=True)
class EngineMemory:
    """What an engine holds on a GPU, in GiB."""

    weights: float
    workspace: float
    sequence: float  # KV cache of one sequence of full length
    cache: float | None  # KV cache; None: what its share of the GPU leaves
    share: float  # of the GPU, if the cache has no given size

    @classmethod
    def of(cls, shape: ModelShape, dtype: str, tokens: int, pool: PoolConfig) -> "EngineMemory":
        """Return what an engine of a pool holds on each of its GPUs. tokens: of a sequence of full length."""
        parts = pool.tensor_parallel
        width = WIDTH[dtype]
        prefill = max(tokens, PREFILL["cuda"]) * width * (3 * shape.intermediate + 4 * shape.hidden)
        scored = SCORED_AT_ONCE * shape.vocabulary * (width + WIDTH["float32"])
        return cls(
            weights=width * shape.parameters / parts / GIB,
            workspace=WORKSPACE_GIB + max(prefill, scored) / GIB,
            sequence=2 * width * shape.layers * shape.keys * tokens / parts / GIB,
            cache=None if pool.kv_cache_gib is None else pool.kv_cache_gib / parts,
            share=pool.gpu_memory_utilization or ALONE,
        )

    @property
    def least(self) -> float:
        """What it needs for one sequence."""
        return self.weights + self.workspace + self.sequence

    def on(self, card: float | None) -> float:
        """What it takes of a GPU with so much memory; of one of unknown size a share is what it needs at least."""
        if self.cache is not None:
            return self.weights + self.workspace + self.cache
        return self.least if card is None else self.share * card
