"""The settings of vLLM for an engine."""

from pathlib import Path

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, WeightTransferConfig
from vllm.config.kernel import IrOpPriorityConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from sdft.actors.config import PREFILL, EngineSettings
from sdft.actors.vllm.compat import carries_state, missing_architectures, register_beside_images
from sdft.actors.vllm.kernels import fused_norms
from sdft.actors.vllm.scoring import SharedPrompts
from sdft.actors.vllm.transfer import BACKEND


def arguments(s: EngineSettings) -> AsyncEngineArgs:
    """vLLM's settings. A prompt is shared if the settings ask for it and no layer carries a state along it.

    Of such a model vLLM can only keep the state at the ends of chunks, and prompts are not chunked.
    """
    register_beside_images(Path(s.model))
    made = _arguments(s, s.share_prompts)
    return _arguments(s, share=False) if s.share_prompts and carries_state(made) else made


def returns_experts(s: EngineSettings) -> bool:
    """Whether vLLM returns the experts of rollouts. Its V1 runner, which CPUs have, cannot (experts.py)."""
    return s.keep_experts and s.device == "cuda"


def _compilation(s: EngineSettings) -> CompilationConfig:
    """CUDA graphs of the decoding steps need no compiling; vLLM's own default compiles, and captures both."""
    if s.execution != "graphs":
        return CompilationConfig()
    return CompilationConfig(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.FULL_DECODE_ONLY)


def _arguments(s: EngineSettings, share: bool) -> AsyncEngineArgs:
    return AsyncEngineArgs(
        model=s.model,
        hf_overrides=missing_architectures(Path(s.model)),
        load_format="safetensors",  # "auto" prefers consolidated*.safetensors to the files in the index
        dtype=s.dtype,
        enforce_eager=s.execution == "eager",
        enable_sleep_mode=s.sleeps,
        compilation_config=_compilation(s),
        ir_op_priority=fused_norms() if s.execution == "eager" and s.device == "cpu" else IrOpPriorityConfig(),
        max_model_len=s.max_model_len,
        # One more place, so that the probe of an update can run while all others are taken.
        max_num_seqs=s.max_num_seqs if s.hold_batches else s.max_num_seqs + 1,
        # No chunking of prompts: CPU generators cannot skip ahead, so a chunked seeded prompt kills the engine; and all
        # scores of a prompt are by one version of the weights.
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(s.max_model_len, PREFILL[s.device]),
        # A hit changes the shapes of a prefill and so the last bits of a log-prob, in the same way in each run.
        enable_prefix_caching=share or returns_experts(s),  # vLLM keeps the experts beside the blocks of the cache
        enable_return_routed_experts=returns_experts(s),
        scheduler_cls=SharedPrompts if share else None,
        block_size=64 if share and s.device == "cpu" else None,  # vLLM shares whole blocks only
        max_logprobs=s.max_logprobs,
        # Rollouts: no sampling defaults of the model folder; its ends of a reply count. Users expect the defaults.
        generation_config="auto" if s.serves else "vllm",
        # Rollouts: log-probs of the distribution sampled from, including temperature.
        logprobs_mode="raw_logprobs" if s.serves else "processed_logprobs",
        gpu_memory_utilization=s.gpu_memory_utilization,
        # Of each worker, which has its part of the heads.
        kv_cache_memory_bytes=None if s.kv_cache_gib is None else int(s.kv_cache_gib * 2**30) // s.tensor_parallel,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        worker_extension_cls=s.extension,
        tensor_parallel_size=s.tensor_parallel,
        distributed_executor_backend="uni" if s.tensor_parallel == 1 else "mp",
        disable_log_stats=True,
    )
