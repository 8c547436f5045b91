"""A worker extension with the norms that vLLM's CPU platform chooses, the baseline of benchmarks.rollouts."""

from sdft.actors.vllm.compat import norm_operations
from sdft.actors.vllm.extension import WorkerExtension


class Extension(WorkerExtension):
    """Loaded into the worker process in place of sdft.actors.vllm.extension.WorkerExtension."""

    def score_completions_only(self) -> None:
        """Set plain norms, then call the default method."""
        for op in norm_operations().values():
            op.set_default(["native"])
        super().score_completions_only()
