"""Estimate of the peak main memory of a learner rank: state as ZeRO divides it, activations by the model's shape.

The factors of the activations are fitted to measured peaks of SmolLM2-135M (bfloat16 and float32, 1024 to 8192 tokens,
with and without gradient checkpointing, with and without LoRA; within 7 %). tests/services/planning/test_memory.py
repeats the measurement. Those of a support are measured at its head, with 1024 to 49152 tokens a position.
"""

import numpy as np

from sdft.actors.shared.process import GIB
from sdft.learner.config import ATTENTION_KEPT, CHUNK_BYTES, LearnerConfig, TeacherConfig
from sdft.services.planning.shape import ModelShape

WIDTH = {"bfloat16": 2, "float32": 4}  # bytes a number
FILE_BYTES = 2  # bytes a number in a model's files, usually
PROCESS_GIB = 0.6  # Python, Ray, torch, transformers, DeepSpeed
PEFT_GIB = 0.1
CUDA_PROCESS_GIB = 2.5  # the same with CUDA's libraries: an assumption
# Bytes for each token of a support at each loss token, besides its scores.
PACKED_BYTES = 20  # of a micro-batch: int64 and float32, with a copy while they are packed
DIFFERENTIATED_BYTES = 45  # of a chunk: log-probs, both distributions and their gradient
# Bytes for each entry of the scores in an engine's two processes, measured with 2048 tokens at a vocabulary of 49152.
ENGINE_BYTES = 32


def learner_gib(
    config: LearnerConfig,
    teacher: TeacherConfig,
    dtype: str,
    shape: ModelShape,
    tokens: int,
    rows: int,
    sequence: int,
    stages: int = 1,
    further: int = 0,
    width: int = 0,
    share: int = 0,
) -> float:
    """Estimate the peak in GiB of the first rank, which also holds the snapshots.

    tokens: of one forward. rows: those of them in the loss. sequence: tokens a sequence. stages: stages of the run.
    further: pools with the student's weights besides the student's own; each has a snapshot of its own.
    width: tokens of the support at a position. share: loss tokens of the rank's share of a batch.
    """
    process = PROCESS_GIB if config.lora is None else PROCESS_GIB + PEFT_GIB
    total = state_bytes(config, teacher, dtype, shape, stages)
    total += _gradient_bytes(config, dtype, shape) + _snapshot_bytes(config, teacher, dtype, shape, further)
    total += _activation_bytes(config, dtype, shape, tokens, sequence)
    total += scores_bytes(share, width) + _support_bytes(dtype, shape, rows, sequence, width)
    return process + (total + _loss_bytes(config, dtype, shape, rows)) / GIB


def learner_beside_gpu_gib(
    config: LearnerConfig,
    teacher: TeacherConfig,
    dtype: str,
    shape: ModelShape,
    stages: int = 1,
    further: int = 0,
    width: int = 0,
    share: int = 0,
) -> float:
    """Estimate the peak in GiB of the main memory of the first rank if it computes on a GPU. Arguments: learner_gib."""
    total = _snapshot_bytes(config, teacher, dtype, shape, further) + scores_bytes(share, width)
    total += offloaded_bytes(config, teacher, dtype, shape, stages) if config.offload else 0
    return CUDA_PROCESS_GIB + total / GIB


def scores_bytes(rows: int, width: int) -> int:
    """Return the bytes of the teacher's scores of `rows` tokens: an id and a log-prob for each token of the support."""
    return rows * width * (np.dtype(np.int32).itemsize + np.dtype(np.float32).itemsize)


def state_bytes(config: LearnerConfig, teacher: TeacherConfig, dtype: str, shape: ModelShape, stages: int) -> float:
    """Bytes that a rank holds between two steps: weights, masters, moments, teacher and float32 gradients.

    With LoRA the frozen model, its adapters and the teacher's float32 change of it, if that ever changes. What is
    offloaded is not among them.
    """
    width, stage = WIDTH[dtype], config.zero_stage_for(dtype)
    offloaded = 0 if config.offload else offloaded_bytes(config, teacher, dtype, shape, stages)
    weights = width / (config.ranks if stage > 2 else 1)
    if config.zero_group is not None:
        weights += width / config.zero_group
    if config.lora is not None:
        return weights * shape.parameters + 8 * shape.adapters + offloaded
    masters = 4 / config.ranks if stage > 0 else 0  # at ZeRO stage 0 the weights are the masters
    accumulated = 0 if stage == 0 else 4 / (config.ranks if stage > 1 else 1)  # gradients, in float32
    return shape.parameters * (masters + accumulated + weights) + offloaded


def offloaded_bytes(config: LearnerConfig, teacher: TeacherConfig, dtype: str, shape: ModelShape, stages: int) -> float:
    """Bytes of a rank's state that learner.offload keeps in the host's memory: moments, and the teacher."""
    if config.lora is not None:
        return 8 * shape.adapters + _change_bytes(config, teacher, shape, stages)
    ema = 0 if teacher.weights == "live" else 4
    return shape.parameters * (8 + ema) / (config.ranks if config.zero_stage_for(dtype) > 0 else 1)


def _change_bytes(config: LearnerConfig, teacher: TeacherConfig, shape: ModelShape, stages: int) -> float:
    becomes_student = teacher.weights == "gated" or (stages > 1 and teacher.weights in ("ema", "frozen"))
    moves = teacher.weights == "ema" and teacher.alpha > 0
    return 4 * shape.adapted / config.ranks if moves or becomes_student else 0


def packed_bytes(config: LearnerConfig, teacher: TeacherConfig, dtype: str, shape: ModelShape, further: int) -> float:
    """Return the bytes of the newest snapshot of each role. further: as in learner_gib."""
    width, teachers = WIDTH[dtype], 0 if teacher.weights == "live" else 1
    if config.lora is None:
        return width * shape.parameters * (1 + teachers + further)
    return width * (shape.parameters * teachers + shape.adapters * (1 + further))


def _snapshot_bytes(
    config: LearnerConfig, teacher: TeacherConfig, dtype: str, shape: ModelShape, further: int
) -> float:
    """Bytes of the snapshots.

    With LoRA the verification of a student's snapshot takes the merged model and the file that it is merged from.
    """
    verified = 0 if config.lora is None else (WIDTH[dtype] + FILE_BYTES) * shape.parameters
    return packed_bytes(config, teacher, dtype, shape, further) + verified


def _gradient_bytes(config: LearnerConfig, dtype: str, shape: ModelShape) -> float:
    """Bytes of the gradients that backward computes; those of adapters are in the state."""
    if config.lora is not None:
        return 0
    return WIDTH[dtype] * shape.parameters / (config.ranks if config.zero_stage_for(dtype) > 2 else 1)


def _activation_bytes(config: LearnerConfig, dtype: str, shape: ModelShape, tokens: int, sequence: int) -> float:
    """Bytes that autograd keeps in a forward of `tokens` tokens.

    Per token and layer, in the model's dtype: about 7 vectors of the hidden size, 4 of the feed-forward size, and the
    attention weights of short sequences. Also 3.5 vectors of the hidden size in float32.
    """
    width = WIDTH[dtype]
    attention = shape.heads * min(sequence, ATTENTION_KEPT)  # capped: most sequences are shorter than the longest
    layer = width * (7 * shape.hidden + 4 * shape.intermediate + attention) + 14 * shape.hidden
    if not config.gradient_checkpointing:
        return tokens * shape.layers * layer
    # The input of each layer and up to 8 active layers: measured, not derived.
    return tokens * (shape.layers * width * shape.hidden + min(8, shape.layers) * layer)


def _support_bytes(dtype: str, shape: ModelShape, rows: int, sequence: int, width: int) -> float:
    """Bytes of a support of `width` tokens: packed for all rows, differentiated for a chunk or a whole sequence."""
    return width * (PACKED_BYTES * rows + DIFFERENTIATED_BYTES * min(rows, max(sequence, _chunk(dtype, shape))))


def _chunk(dtype: str, shape: ModelShape) -> int:
    """Loss tokens whose logits exist at a time."""
    return CHUNK_BYTES["cpu"] // max(1, WIDTH[dtype] * shape.vocabulary)


def _loss_bytes(config: LearnerConfig, dtype: str, shape: ModelShape, rows: int) -> float:
    width, chunk = WIDTH[dtype], _chunk(dtype, shape)
    gradient = 0 if config.lora is not None else width + (4 if rows > chunk else 0)  # of the output head
    return shape.vocabulary * (min(rows, chunk) * width + shape.hidden * gradient)
