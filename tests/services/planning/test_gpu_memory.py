"""The GPU memory of a learner as `sdft check` predicts it: against torch's meta device, and an H200's peaks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.allocated import Allocated, Case, allocated, estimated, model_shape
from benchmarks.counted import COMPLETION, LENGTH
from sdft.actors.shared.process import GIB
from sdft.learner.config import LearnerConfig, LoraConfig, TeacherConfig
from sdft.learner.model.attention import PACKED
from sdft.learner.model.fused import fuse
from sdft.services.planning.gpu_memory import Forward, learner_gpu_gib, peak_bytes
from sdft.services.planning.shape import FUSED, ModelShape

# One H200, Qwen2.5's shapes in bfloat16, sequences of LENGTH tokens: tokens of the step and of the micro-batch, with
# gradient checkpointing, with LoRA, and the peak of allocated GiB. Layers were plain, keys and values copied to all
# heads and the loss's chunks smaller: at most 1.1 GiB each, in opposite directions.
MEASURED = [
    ("1.5b", 8192, 8192, False, False, 53.5),
    ("1.5b", 32768, 4096, False, False, 46.2),
    ("1.5b", 32768, 8192, False, False, 56.4),
    ("1.5b", 32768, 32768, True, False, 38.8),
    ("3b", 8192, 8192, False, False, 98.2),
    ("3b", 32768, 8192, True, False, 72.1),
    ("3b", 32768, 32768, True, False, 74.1),
    ("7b", 32768, 8192, True, True, 43.5),
]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("shape", "tokens"), [("1.5b", 8192), pytest.param("7b", 32768, marks=pytest.mark.whole)])
def test_each_part_of_a_micro_batch_is_within_10_percent_of_what_the_meta_device_counts(
    shape: str, tokens: int, fused: bool, checkpointing: bool, later: bool
) -> None:
    assert_near(Case(shape, tokens, fused, checkpointing, later))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_so_is_each_part_with_adapters(checkpointing: bool) -> None:
    """Of rank 64, so that they would be missed. Layers with adapters are not fused, although the model's could be."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert_near(Case("1.5b", 8192, checkpointing=checkpointing, lora=LoraConfig(rank=64, targets=targets)))


@pytest.mark.parametrize("support", [1024, 50_000])
def test_so_is_each_part_with_a_wide_support(support: int) -> None:
    assert_near(Case("0.5b", 4096, support=support))


def assert_near(case: Case) -> None:
    counts, estimates = allocated(case), estimated(case)
    print(f"{case}: counted {text(counts)}; estimated {text(estimates)} GiB")
    assert vars(estimates) == pytest.approx(vars(counts), rel=0.1)


@pytest.mark.parametrize("kind", FUSED)
def test_the_learner_fuses_the_layers_of_the_families_that_are_estimated_so(kind: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(kind, num_hidden_layers=2, head_dim=32, vocab_size=128, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    assert fuse(model) == 2
    parts = (part for layer in model.base_model.layers for part in (layer.self_attn, layer.mlp))
    assert all(isinstance(part.forward, partial) for part in parts)


def text(bytes_of: Allocated) -> str:
    return ", ".join(f"{part} {size / GIB:.2f}" for part, size in vars(bytes_of).items())


def test_fused_layers_keep_two_thirds_and_checkpointing_a_tenth() -> None:
    fused = Case("1.5b", 4096)
    cases = replace(fused, fused=False), fused, replace(fused, checkpointing=True)
    plain, kept, checkpointing = (allocated(case).kept for case in cases)
    assert 0.6 * plain < kept < 0.7 * plain
    assert checkpointing < 0.1 * kept


@pytest.mark.parametrize(("shape", "tokens", "micro", "checkpointing", "lora", "peak"), MEASURED)
def test_the_predicted_peak_is_within_10_percent_of_one_that_an_h200_had(
    shape: str, tokens: int, micro: int, checkpointing: bool, lora: bool, peak: float
) -> None:
    """So is the prediction of the whole process, with the assumed allocator and context."""
    adapters = LoraConfig() if lora else None
    config = LearnerConfig(gradient_checkpointing=checkpointing, lora=adapters)
    of_model = model_shape(shape, False, adapters)
    forward = Forward(micro, micro // LENGTH * COMPLETION, 64, alone=tokens == micro)
    settings = config, TeacherConfig(alpha=0.01), "bfloat16", of_model, forward
    tensors, process = peak_bytes(*settings) / GIB, learner_gpu_gib(*settings)
    print(f"{shape} {tokens}:{micro}: measured {peak}, tensors {tensors:.1f}, process {process:.1f} GiB")
    assert tensors == pytest.approx(peak, rel=0.03)
    assert process == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("teacher", "ranks", "stage", "bytes_of"),
    [
        ("ema", 1, 1, 22),
        ("live", 1, 1, 18),
        ("ema", 4, 1, 2 + 4 + 16 / 4),
        ("ema", 4, 2, 2 + 20 / 4),
        ("ema", 4, 3, 22 / 4),
    ],
)
def test_the_state_of_a_parameter_is_divided_as_zero_divides_it(
    teacher: str, ranks: int, stage: int, bytes_of: float
) -> None:
    config = LearnerConfig(ranks=ranks, zero_stage=stage)
    of_teacher = TeacherConfig.model_validate({"weights": teacher})
    small, large = (
        peak_bytes(config, of_teacher, "bfloat16", ModelShape(p, 1, 8, 8, 8, 1), Forward(1, 1))
        for p in (10**10, 2 * 10**10)
    )
    gradients = 2 if stage < 2 else 0  # at the others a bucket of constant size
    assert (large - small) / 10**10 == pytest.approx(bytes_of + gradients)
