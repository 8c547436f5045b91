"""Estimate of the peak GPU memory of a learner rank: its state, what a micro-batch keeps, and temporaries.

    forward   state + activations + the loss's chunk of logits and the head's gradient
    backward  state + activations, fewer with every layer, + gradients, more with every layer, + one layer's temporaries
    step      state + gradients + one of them in float32

The estimate is the largest of the three. The formulas are those of layers with Llama's code, derived from what each
operation saves for backward. A model of other layers is estimated as if it had plain ones of its sizes.
tests/services/planning/test_gpu_memory.py compares them with allocations counted on torch's meta device, and with the
peaks of an H200 at 1.5B, 3B and 7B. Those peaks are the bytes of tensors (`max_memory_allocated`), of earlier, plain
layers and chunks. They say nothing of the allocator's own use and of the context: ALLOCATOR and CONTEXT_GIB are
assumptions. So are the parts of ZeRO stages 2 and 3 and of several ranks.
"""

from dataclasses import dataclass

from sdft.actors.shared.process import GIB
from sdft.learner.config import CHUNK_BYTES, FLOAT32_BYTES, OFFLOAD_CHUNK, WIDEST, LearnerConfig, TeacherConfig
from sdft.services.planning.memory import WIDTH, state_bytes
from sdft.services.planning.shape import ModelShape

CONTEXT_GIB = 0.6  # CUDA context, loaded kernels and the libraries' workspaces: an assumption
ALLOCATOR = 1.05  # memory that torch's allocator holds, relative to the tensors' peak: an assumption
BUCKET = 500_000_000  # numbers that DeepSpeed reduces at once over ranks
GATHERED = 1_000_000_000  # parameters that DeepSpeed keeps gathered at ZeRO stage 3
# Bytes for each token of a support at each loss token.
PACKED_BYTES = 12  # in the micro-batch: an id and a log-prob
OBJECTIVE_BYTES = 20  # in the objective, which takes all rows at once
WIDE_OBJECTIVE_BYTES = 24  # the same of a support that no fused kernel holds


@dataclass(frozen=True)
class Forward:
    """A rank's largest micro-batch."""

    tokens: int
    rows: int  # tokens in the loss
    width: int = 1  # tokens of the support at a position
    alone: bool = False  # it is the only one of its step: no gradients are there before its backward


def learner_gpu_gib(
    config: LearnerConfig, teacher: TeacherConfig, dtype: str, shape: ModelShape, forward: Forward, stages: int = 1
) -> float:
    """Estimate the peak in GiB of a learner rank on a GPU. stages: stages of the run."""
    return CONTEXT_GIB + ALLOCATOR * peak_bytes(config, teacher, dtype, shape, forward, stages) / GIB


def resting_gpu_gib(config: LearnerConfig, teacher: TeacherConfig, dtype: str, shape: ModelShape, stages: int) -> float:
    """Estimate what a rank holds between two steps, if torch gives the rest back, in GiB."""
    return CONTEXT_GIB + ALLOCATOR * state_bytes(config, teacher, dtype, shape, stages) / GIB


def peak_bytes(
    config: LearnerConfig, teacher: TeacherConfig, dtype: str, shape: ModelShape, forward: Forward, stages: int = 1
) -> float:
    """Estimate the peak of the bytes of all tensors of a rank."""
    stage = config.zero_stage_for(dtype)
    state = state_bytes(config, teacher, dtype, shape, stages)
    if stage > 2:
        state += WIDTH[dtype] * min(GATHERED, shape.parameters)
    beside = max(
        forward_bytes(config, dtype, shape, forward),
        backward_bytes(config, dtype, shape, forward),
        _step_bytes(config, dtype, shape),
    )
    return state + PACKED_BYTES * forward.rows * forward.width + beside


def forward_bytes(config: LearnerConfig, dtype: str, shape: ModelShape, forward: Forward) -> float:
    """Bytes beside the state at the end of a forward, in the loss."""
    before = 0 if forward.alone else _gradient_bytes(config, dtype, shape)
    return before + activation_bytes(config, dtype, shape, forward) + _loss_bytes(config, dtype, shape, forward)


def backward_bytes(config: LearnerConfig, dtype: str, shape: ModelShape, forward: Forward) -> float:
    """Bytes beside the state in backward: at its first layer, at its last one or at its end."""
    attention, network, temporary = _layer_bytes(config, dtype, shape)
    active = temporary * forward.tokens
    layer = (attention + network) * forward.tokens
    gradients, head = _gradient_bytes(config, dtype, shape), _head_bytes(config, dtype, shape)
    before = 0 if forward.alone else gradients
    states = WIDTH[dtype] * shape.hidden * (forward.tokens + forward.rows)  # their gradients
    kept = activation_bytes(config, dtype, shape, forward)
    first = before + head + states + kept + active + (layer if config.gradient_checkpointing else 0)
    # The gradients of the last layer, and of an embedding that is not the head, come after its temporaries.
    behind = (shape.parameters - shape.embeddings) / max(1, shape.layers) + shape.embeddings
    later = 0 if config.lora is not None or not forward.alone else WIDTH[dtype] * behind - head
    last = gradients - min(later, gradients) + layer + active
    # Of a tied head both gradients are there at the end, and their sum.
    tied = shape.embeddings == shape.vocabulary * shape.hidden
    return max(first, last, gradients + (2 * head if tied else 0))


def activation_bytes(config: LearnerConfig, dtype: str, shape: ModelShape, forward: Forward) -> float:
    """Bytes that a forward keeps for backward, without parameters.

    With gradient checkpointing the input of each layer. Otherwise all that the layers' operations save; the last
    network computes only the tokens in the loss.
    """
    width, tokens, rows = WIDTH[dtype], forward.tokens, forward.rows
    size = shape.queries // shape.heads if shape.heads else 0
    common = width * (tokens * (shape.hidden + 2 * size) + rows * shape.hidden)  # last norm, angles, states
    if config.gradient_checkpointing:
        return common + shape.layers * width * tokens * shape.hidden
    attention, network, _ = _layer_bytes(config, dtype, shape)
    copies = width * shape.hidden * (shape.queries + 2 * shape.keys) if _is_fused(config, dtype, shape) else 0
    layers = shape.layers * (attention * tokens + copies) + network * ((shape.layers - 1) * tokens + rows)
    return common + layers


def _layer_bytes(config: LearnerConfig, dtype: str, shape: ModelShape) -> tuple[float, float, float]:
    """Bytes a token that a layer keeps in its attention and in its network, and temporaries of its backward.

    In the attention: the layer's input, the normed one, queries, keys and values, the result, the sum after it, and
    float32 numbers of norms and heads. Fused layers keep values as a part of the whole projection. Plain layers keep
    four vectors of the network's inner size, fused ones two. Adapters keep their inner vector.
    """
    width, inner = WIDTH[dtype], shape.intermediate
    adapters = 7 * width * config.lora.rank if config.lora is not None else 0
    numbers = 4 * shape.heads + 8
    if _is_fused(config, dtype, shape):
        attention = width * (3 * shape.hidden + 3 * shape.queries + 3 * shape.keys) + numbers
        return attention, width * (shape.hidden + 2 * inner), width * 4 * inner
    attention = width * (3 * shape.hidden + 2 * shape.queries + 2 * shape.keys) + numbers
    if dtype == "float32":  # no kernel for a pack: keys and values are copied to all heads, and results joined
        attention += width * (3 * shape.queries - 2 * shape.keys)
    return attention + adapters, width * (shape.hidden + 4 * inner), width * 2 * (inner + shape.hidden)


def _is_fused(config: LearnerConfig, dtype: str, shape: ModelShape) -> bool:
    return shape.fused and config.lora is None and config.zero_stage_for(dtype) < 3


def _head_bytes(config: LearnerConfig, dtype: str, shape: ModelShape) -> float:
    """Bytes of the head's gradient; none with LoRA."""
    return 0 if config.lora is not None else WIDTH[dtype] * shape.vocabulary * shape.hidden


def _loss_bytes(config: LearnerConfig, dtype: str, shape: ModelShape, forward: Forward) -> float:
    """Bytes of the loss: a chunk's logits, and the head's gradient, in float32 if there are several chunks.

    Without the fused kernels also two float32 copies of a block of the logits, before the product that the head's
    gradient adds up.
    """
    width, rows, is_fused = WIDTH[dtype], forward.rows, forward.width <= WIDEST
    chunk = min(rows, max(1, CHUNK_BYTES["cuda"] // max(1, width * shape.vocabulary)))
    head = _head_bytes(config, dtype, shape)
    total = head / width * 4 if chunk < rows else head
    blocks = 0 if is_fused else 2 * min(4 * chunk * shape.vocabulary, FLOAT32_BYTES["cuda"])
    objective = rows * forward.width * (OBJECTIVE_BYTES if is_fused else WIDE_OBJECTIVE_BYTES)
    logits = width * (chunk * shape.vocabulary + rows * shape.hidden)  # and the gradients of the states
    return logits + total + max(head, blocks) + objective


def _gradient_bytes(config: LearnerConfig, dtype: str, shape: ModelShape) -> float:
    """Bytes of all gradients in the model's dtype. At ZeRO stages 2 and 3 those that wait for their reduction."""
    trained = shape.parameters if config.lora is None else shape.adapters
    return WIDTH[dtype] * (trained if config.zero_stage_for(dtype) < 2 else min(2 * BUCKET, trained))


def _step_bytes(config: LearnerConfig, dtype: str, shape: ModelShape) -> float:
    """Bytes beside the state in the step: all gradients, and the largest in float32, or those that ranks reduce.

    AdamW and the teacher's average change their tensors in place; what is offloaded comes in chunks.
    """
    trained = shape.parameters if config.lora is None else shape.adapters
    chunk = 12 * min(OFFLOAD_CHUNK, trained) if config.offload else 0
    if config.zero_stage_for(dtype) == 0:
        return _gradient_bytes(config, dtype, shape) + chunk
    waiting = WIDTH[dtype] * BUCKET if config.overlap else 0  # the bucket that is sent while another one is filled
    largest = shape.vocabulary * shape.hidden if config.lora is None else 0
    reduced = 4 * (min(BUCKET, trained) if config.ranks > 1 else largest)
    return _gradient_bytes(config, dtype, shape) + waiting + max(reduced, chunk)
