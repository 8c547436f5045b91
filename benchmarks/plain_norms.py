"""A worker extension whose norms are as vLLM's CPU platform has them: what benchmarks.rollouts compares with."""

from vllm import ir

from sdft.actors.vllm.extension import WorkerExtension


class Extension(WorkerExtension):
    """Loaded into the worker process in place of actors.engine.WorkerExtension."""

    def score_completions_only(self) -> bool:
        """As it is, and plain norms from here on."""
        for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
            op.set_default(["native"])
        return super().score_completions_only()
