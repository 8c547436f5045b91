"""A worker extension that leaves vLLM's own prompt log-probs in place: what benchmarks.scoring compares with."""

from sdft.actors.vllm.extension import WorkerExtension


class Extension(WorkerExtension):
    """Loaded into the worker process in place of actors.engine.WorkerExtension."""

    def score_completions_only(self) -> bool:
        """Left out."""
        return False
