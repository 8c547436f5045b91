"""What the engine uses of vLLM, and of Ray and Python beside it, that is not documented. Known for the versions below.

Each function names what it uses. tests/actors/vllm/test_compat.py has one line for each name and fails without it.
"""

import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_torchvision_available
from vllm import ModelRegistry, SamplingParams, ir
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import FlatLogprobs
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.outputs import RequestOutput
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.request import Request

from sdft.actors.shared.types import FloatArray, IntArray

VLLM = "0.32.0"
RAY = "2.60.0"
PYTHON = "3.11"
# Text models whose modules in vLLM import torchvision, by way of transformers' code for images.
BESIDE_IMAGES = dict.fromkeys(("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"), "vllm.model_executor.models.qwen3_5")
TORCHVISION = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)

Rows = Callable[[SamplingParams], int | None]  # a request's first scored row; None: the request scores nothing
NameOf = Callable[[SamplingParams], str | None]  # a request's name; None: it has none
Output = Callable[[], Awaitable[RequestOutput]]  # waits for a request's output
Takes = Callable[..., bool]  # whether a kernel supports these arguments


async def enqueue(llm: AsyncLLM, name: str, ids: list[int], params: SamplingParams) -> Output:
    """Send a request to the engine. Returns a function that waits for its output.

    Uses AsyncLLM.add_request and its RequestOutputCollector. The documented AsyncLLM.generate sends a request only when
    its output is awaited, so a held batch would never be complete.
    """
    queue = await llm.add_request(name, {"prompt_token_ids": ids}, params)

    async def output() -> RequestOutput:
        return queue.get_nowait() or await queue.get()

    return output


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probs of a prompt's rows, as the runner sent them."""

    ids: IntArray  # [rows, 1 + width]: the token itself first
    logprobs: FloatArray  # [rows, 1 + width]


def keep_prompts_as_arrays() -> None:
    """Make vLLM's client keep flat log-probs of a prompt as PromptLogprobs: RequestOutput.prompt_logprobs is one.

    Replaces LogprobsProcessor._update_prompt_logprobs. vLLM's own lists take 100 bytes and more for each log-prob,
    where arrays take 8: a whole vocabulary of 50,000 at 2000 tokens would be 10 GB. Only scoring asks for flat ones.
    """
    own = LogprobsProcessor._update_prompt_logprobs

    def update(self: Any, tensors: LogprobsTensors) -> None:
        if isinstance(self.prompt_logprobs, FlatLogprobs):
            self.prompt_logprobs = PromptLogprobs(tensors.logprob_token_ids.numpy(), tensors.logprobs.numpy())
        else:
            own(self, tensors)

    LogprobsProcessor._update_prompt_logprobs = update


def carries_state(arguments: AsyncEngineArgs) -> bool:
    """Whether layers of the model carry a state from token to token, as state spaces and convolutions do.

    Uses EngineArgs.create_model_config and ModelConfig.is_hybrid and is_attention_free.
    """
    config = arguments.create_model_config()
    return bool(config.is_hybrid or config.is_attention_free)


def missing_architectures(model: Path) -> dict[str, list[str]]:
    """The entry `architectures` for the configuration of a model folder that has none; {} if it has one.

    Uses transformers' MODEL_FOR_CAUSAL_LM_MAPPING_NAMES. vLLM itself would take the model without its head, which
    generates nothing.
    """
    config = json.loads((model / "config.json").read_text())
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"))
    return {} if config.get("architectures") or name is None else {"architectures": [name]}


def register_beside_images(model: Path) -> None:
    """Make vLLM know the text model of a folder if its module imports torchvision, which is not installed.

    torchvision has no build beside PyTorch's build for CPUs, and engines get no images: while the module is imported,
    empty modules stand for it. Uses BESIDE_IMAGES, and that nothing of torchvision is used at the import.
    """
    config = json.loads((model / "config.json").read_text()) | missing_architectures(model)
    known = [name for name in config.get("architectures", ()) if name in BESIDE_IMAGES]
    if not known or is_torchvision_available():
        return
    for name in TORCHVISION:
        module = sys.modules[name] = ModuleType(name)
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)
    try:
        for name in known:
            ModelRegistry.register_model(name, getattr(import_module(BESIDE_IMAGES[name]), name))
    finally:
        for name in TORCHVISION:
            del sys.modules[name]


def hide_rows(runner: Any, vocabulary: int) -> None:
    """Give the tokens from `vocabulary` on the logit -inf: in sampling, in log-probs, and in the probe.

    Replaces compute_logits of the runner's model, from which both runners (V1 and V2) get all logits.
    """
    model = runner.get_model()
    compute = model.compute_logits

    def hidden(*given: Any) -> Any:
        logits = compute(*given)
        if logits is not None:  # as on a rank of tensor parallelism that gathers none
            logits[..., vocabulary:] = -torch.inf
        return logits

    model.compute_logits = hidden


def begin_reload(model: torch.nn.Module) -> None:
    """Prepare a model for load_weights. Uses vLLM's initialize_layerwise_reload, as its own weight transfers do."""
    initialize_layerwise_reload(model)


def finish_reload(model: torch.nn.Module, config: Any) -> None:
    """Lay loaded weights out for the kernels. Uses vLLM's finalize_layerwise_reload. config: vLLM's ModelConfig.

    vLLM lays experts out for a CPU's kernels after the first load only, so later weights would be read in the wrong
    order. Uses quant_method.moe_kernel.fused_experts, CPUUnquantizedExperts and its process_weights_after_loading.
    """
    finalize_layerwise_reload(model, config)
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None and isinstance(kernel.fused_experts, CPUUnquantizedExperts):
            kernel.fused_experts.process_weights_after_loading(layer)


def rotate_each_head() -> None:
    """Make vLLM's rotary embedding on a CPU rotate each head of queries and keys of shape [tokens, heads, head_dim].

    Its kernel takes their second dimension for that of all heads together, so LFM2 would rotate the first head only.
    Replaces RotaryEmbedding.forward_cpu, which works in place.
    """
    own = RotaryEmbedding.forward_cpu

    def flat(self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        if query.dim() != 3:
            return own(self, positions, query, key)
        shapes = query.shape, None if key is None else key.shape
        # Copies: what a model assigns to a part of the queries must not be that part, as with one head and one token.
        rotated = own(self, positions, _rows(query), None if key is None else _rows(key))
        return tuple(x if x is None else x.view(shape) for x, shape in zip(rotated, shapes, strict=True))

    RotaryEmbedding.forward_cpu = flat


def _rows(heads: torch.Tensor) -> torch.Tensor:
    return heads.clone(memory_format=torch.contiguous_format).view(len(heads), -1)


def repack(layer: torch.nn.Module) -> None:
    """Lay one layer's weight out for the kernels, if it has a quant_method. Uses its process_weights_after_loading."""
    if getattr(layer, "quant_method", None) is not None:
        layer.quant_method.process_weights_after_loading(layer)


def limit_cache(scheduler: AsyncScheduler, rows: Rows) -> None:
    """Make a scheduler take from the cache at most the whole blocks before a request's first scored row.

    Replaces get_computed_blocks of Scheduler.kv_cache_manager, which reads Request.block_hashes. The length of a block
    is Scheduler.hash_block_size.
    """
    manager, block = scheduler.kv_cache_manager, scheduler.hash_block_size
    find = manager.get_computed_blocks

    def limited(request: Request) -> Any:
        row = None if request.sampling_params is None else rows(request.sampling_params)
        if row is None:
            return find(request)
        hashes = request.block_hashes
        request.block_hashes = hashes[: row // block]
        try:
            return find(request)
        finally:
            request.block_hashes = hashes

    manager.get_computed_blocks = limited


def begin_of(runner: Any, request_id: str) -> int:
    """The row of a request's first scheduled token in the forward that a V1 model runner computes now."""
    return int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])


def chosen_experts(runner: Any, name_of: NameOf) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Make a V1 model runner keep the experts that the routers choose for the tokens of requests that have a name.

    Returns what it keeps for each name: the position of the first of some tokens, and their experts [tokens, routers,
    k]. Tokens from the prefix cache are not among them. Uses MoERunner.router, BaseRouter.set_capture_fn and, at the
    end of each forward, the runner's _get_prompt_logprobs_dict, as compat_scoring.py does.
    """
    step: list[torch.Tensor] = []  # of each router, in the forward that is computed now
    kept: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for module in runner.get_model().modules():
        if isinstance(module, MoERunner):
            module.router.set_capture_fn(lambda ids: step.append(ids.to(torch.int16)))
    own = runner._get_prompt_logprobs_dict

    def keeping(hidden_states: torch.Tensor, scheduled: dict[str, int]) -> Any:
        experts = torch.stack(step, 1) if step else None
        step.clear()
        for request_id, tokens in scheduled.items():
            request = runner.requests[request_id]
            name = None if request.sampling_params is None else name_of(request.sampling_params)
            if name is not None and experts is not None:
                begin = begin_of(runner, request_id)
                kept.setdefault(name, []).append((request.num_computed_tokens, experts[begin : begin + tokens]))
        return own(hidden_states, scheduled)

    runner._get_prompt_logprobs_dict = keeping
    return kept


def router_layers(runner: Any) -> list[int]:
    """Return the numbers of the layers with routers, in order. Uses MoERunner.layer_id, as vLLM's own capture does."""
    return [module.layer_id for module in runner.get_model().modules() if isinstance(module, MoERunner)]


def norm_operations() -> dict[str, Any]:
    """vLLM's norm operations, by the name that its ir_op_priority gives them. Uses vllm.ir.ops."""
    return {name: getattr(ir.ops, name) for name in ("rms_norm", "fused_add_rms_norm")}


def register_fused_norms(name: str, narrow: Callable[[Takes], Takes]) -> list[str]:
    """Register vLLM's fused norm kernels as the implementation `name` of its norm operations; return their names.

    narrow: restricts the arguments that a kernel supports. Uses vllm.kernels.vllm_c and IrOp.impls and register_impl.
    """
    from vllm.kernels import vllm_c

    takes = {"rms_norm": vllm_c.rms_no_var_size, "fused_add_rms_norm": vllm_c.rms_add_no_var_size}
    for op_name, op in norm_operations().items():
        kernel = getattr(vllm_c, op_name)
        if name not in op.impls:
            op.register_impl(name, supports_args=narrow(takes[op_name]), inplace=kernel.inplace)(kernel.impl_fn)
    return list(takes)
