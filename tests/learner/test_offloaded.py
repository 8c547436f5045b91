"""Optimizer state in the host's memory: the same bits as on the device, in chunks of any size."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sdft.learner.config import LoraConfig
from sdft.learner.group import LearnerGroup
from sdft.learner.offloaded import OffloadedAdamW
from sdft.learner.optimizer import AdamWWithTeacher
from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import PROBE, SKIP, K, settings, worst


def steps(kind: Callable[..., AdamWWithTeacher], alpha: float | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return two parameters and their state after five steps, one of them without a finite gradient."""
    chance = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=chance).to(dtype).requires_grad_() for shape in ((10_007,), (3, 321))]
    adam = kind(params, alpha, clip=1.0)
    adam.param_groups[0] |= {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    for step in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=chance).to(dtype) * (torch.inf if step == 2 else 1)
        adam.step()
    found = {f"{i} {key}": value for i, p in enumerate(params) for key, value in adam.state[p].items()}
    return found | {f"{i} parameter": p.detach() for i, p in enumerate(params)}


@pytest.mark.parametrize("alpha", [0.1, 0.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_chunks_have_the_bits_of_whole_steps(alpha: float | None, dtype: torch.dtype) -> None:
    class InChunks(OffloadedAdamW):
        chunk = 1024

    whole, chunks = steps(AdamWWithTeacher, alpha, dtype), steps(InChunks, alpha, dtype)
    assert whole.keys() == chunks.keys()
    assert ("0 teacher" in whole) == (alpha is not None)
    for name, value in whole.items():
        assert torch.equal(value, chunks[name]), name
    assert float(whole["0 step"]) == 4


@pytest.mark.parametrize("alpha", [0.1, 0.0, None])
@pytest.mark.parametrize("kind", [AdamWWithTeacher, OffloadedAdamW])
def test_steps_in_one_pass_are_those_of_torch_to_rounding(kind: type[AdamWWithTeacher], alpha: float | None) -> None:
    several, one = (steps(partial(kind, in_one_pass=p), alpha, torch.float32) for p in (False, True))
    assert several.keys() == one.keys()
    torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-6)
    assert not torch.equal(one["0 exp_avg_sq"], several["0 exp_avg_sq"])  # two implementations are compared


@pytest.mark.parametrize("kind", [AdamWWithTeacher, OffloadedAdamW])
def test_each_parameter_counts_its_own_steps(kind: type[AdamWWithTeacher]) -> None:
    """At ZeRO stage 3 DeepSpeed steps one part of the parameters after the other; some have no gradient in a step."""
    found = []
    for in_one_pass in (False, True):
        params = [torch.ones(5, requires_grad=True) for _ in range(2)]
        adam = kind(params, 0.1, in_one_pass=in_one_pass)
        adam.param_groups[0]["lr"] = 0.1
        for stepped in ((0,), (1,), (0, 1), (1,)):
            for i, p in enumerate(params):
                p.grad = torch.full((5,), 0.5) if i in stepped else None
            adam.step()
        found.append([(p.detach(), *adam.state[p].values()) for p in params])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    assert [float(adam.state[p]["step"]) for p in params] == [2, 3]


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype", "lora"),
    [
        pytest.param(1, 1, "bfloat16", LoraConfig(rank=4), marks=pytest.mark.whole),
        pytest.param(0, 1, "float32", None, marks=pytest.mark.whole),
        pytest.param(1, 1, "bfloat16", None, marks=pytest.mark.whole),
        pytest.param(3, 2, "float32", None, marks=pytest.mark.whole),
    ],
)
def test_a_learner_that_offloads_has_the_bits_of_one_that_does_not(
    ray_cluster: None, tiny_model: Path, tmp_path: Path, stage: int, ranks: int, dtype: str, lora: LoraConfig | None
) -> None:
    """Student and teacher after three steps, of which the last follows a save and a load."""

    async def trained(offload: bool) -> list[dict[str, np.ndarray]]:
        given = settings(tiny_model, stage, ranks, dtype, lora=lora, offload=offload)
        group = await LearnerGroup.start(given, PROBE, [{"num_cpus": 0.5}] * ranks)
        for seed in range(2):
            await group.train_step(make_rollouts(tiny_model, 7, K, seed, SKIP))
        (tmp_path / str(offload)).mkdir()
        await group.save(tmp_path / str(offload))
        await group.written()
        assert await group.load(tmp_path / str(offload)) == 2
        await group.train_step(make_rollouts(tiny_model, 7, K, 2, SKIP))
        found = [await group.parameters(role) for role in ("student", "teacher")]
        for worker in group.workers:
            worker.__ray_terminate__.remote()
        return found

    async def run() -> None:
        student, teacher = await trained(offload=True)
        assert worst(student, teacher) > 0
        assert [worst(a, b) for a, b in zip((student, teacher), await trained(offload=False), strict=True)] == [0, 0]

    asyncio.run(run())


def test_on_a_cpu_the_setting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: {train: a.jsonl}\ntraining: {steps: 1}\nlearner: {offload: true}\n")
    with pytest.raises(UserError, match=r"learner\.offload keeps .* where device: cpu keeps it too; remove it"):
        load_config(path)
