"""What a rank holds between two steps, counted in a real learner: the state that the plan of its memory assumes."""

import gc
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdft.learner.config import LearnerConfig, LoraConfig, OptimizerConfig, TeacherConfig
from sdft.learner.types import LearnerSettings, StageSettings
from sdft.services.algorithms.sdft import Sdft
from sdft.services.planning.memory import state_bytes
from sdft.services.planning.shape import ModelShape, read_headers

PROBE = np.arange(100, 132, dtype=np.int32)


def held(settings: LearnerSettings) -> int:
    """Start a rank in this process. Returns the bytes of all tensors' memory, each part once."""
    import torch

    from sdft.learner.worker import LearnerWorker

    worker = LearnerWorker()
    worker.start(settings, 1, *worker.rendezvous(), PROBE)
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("dtype", "teacher", "lora", "per_parameter"),
    [
        pytest.param("bfloat16", {"weights": "ema"}, None, 22, marks=pytest.mark.whole),
        pytest.param("bfloat16", {"weights": "live"}, None, 18, marks=pytest.mark.whole),
        # the gradients come in backward
        pytest.param("float32", {"weights": "ema"}, None, 16, marks=pytest.mark.whole),
        pytest.param("bfloat16", {"weights": "ema"}, LoraConfig(rank=4), None, marks=pytest.mark.whole),
    ],
)
def test_a_rank_holds_the_state_that_the_plan_assumes(
    tiny_model: Path, dtype: str, teacher: dict[str, Any], lora: LoraConfig | None, per_parameter: int | None
) -> None:
    of_teacher, config = TeacherConfig.model_validate(teacher), LearnerConfig(threads=1, lora=lora)
    stage = StageSettings(0, 10, Sdft().losses, OptimizerConfig())
    settings = LearnerSettings(str(tiny_model), dtype, "cpu", 0, config, (stage,), of_teacher)
    with get_context("spawn").Pool(1) as pool:
        counted = pool.apply(held, (settings,))
    shape = ModelShape.of(tiny_model, read_headers(tiny_model), lora)
    print(f"{dtype}, {teacher}, {lora}: {counted / shape.parameters:.2f} B a parameter")
    assumed = state_bytes(config, of_teacher, dtype, shape, stages=1)
    assert counted == pytest.approx(assumed, rel=0.05)
    if per_parameter is not None:
        assert assumed == per_parameter * shape.parameters
