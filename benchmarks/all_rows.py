"""A worker extension that keeps vLLM's own prompt log-probs, the baseline of benchmarks.scoring."""

from sdft.actors.vllm.extension import WorkerExtension


class Extension(WorkerExtension):
    """Loaded into the worker process in place of sdft.actors.vllm.extension.WorkerExtension."""

    def score_completions_only(self) -> None:
        """Leave vLLM's method in place."""
