"""LoRA: the learner against plain torch, its files against peft. test_engine merges adapters, test_job runs a whole
run."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sdft.actors.shared.adapters import DOWN, UP, merged
from sdft.actors.shared.types import Snapshot
from sdft.learner.config import LoraConfig
from sdft.learner.group import LearnerGroup
from sdft.learner.weights.export import merge_adapter
from tests.fakes.reference import LoraReference
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import (
    ADAMW,
    ALPHA,
    BETAS,
    BOUNDARY,
    CLIP,
    OPTIMIZER,
    PROBE,
    K,
    assert_equal,
    rate,
    settings,
    worst,
)

LARGER = OPTIMIZER.model_copy(update={"lr": 1e-3})  # usual for LoRA; a lower one would show float32's own rounding
LORA = LoraConfig(rank=4, alpha=12, targets=("q_proj", "v_proj", "down_proj"))


async def saved(group: LearnerGroup, folder: Path) -> Path:
    folder.mkdir()
    await group.save(folder)
    await group.written()
    return folder


def content(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """Return the tensors in a snapshot's memory, as an engine reads them."""
    payload = Path(snapshot.path).read_bytes()
    return {
        t.name: torch.frombuffer(bytearray(payload[t.offset : t.offset + t.nbytes]), dtype=torch.float32).view(t.shape)
        for t in snapshot.tensors
    }


@pytest.mark.whole
def test_adapters_and_teacher_are_those_of_one_process_whatever_the_ranks_and_stages(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """1 rank at ZeRO stage 1, 2 at 3, 2 at 2, each resuming the one before. The teacher is the EMA of the weights.

    The run's second stage begins after the second step, with the student as teacher.
    """

    async def run() -> None:
        plain: LoraReference | None = None
        folder, seed = tmp_path, 0
        for stage, ranks, steps in [(1, 1, 2), (3, 2, 1), (2, 2, 2)]:
            given = settings(tiny_model, stage, ranks, lora=LORA, optimizer=LARGER)
            group = await LearnerGroup.start(given, PROBE, [{"num_cpus": 0.5}] * ranks)
            if plain is None:
                snapshot = await group.publish("student", 0)
                assert snapshot.scale == 3
                plain = LoraReference(tiny_model, content(snapshot), snapshot.scale, ALPHA, CLIP, **ADAMW)
                base = {name: p.numpy().copy() for name, p in plain.weights().items()}
                assert worst(await group.parameters("student"), base) == 0
                assert worst(await group.parameters("teacher"), base) == 0
            else:
                assert await group.load(folder) == seed
            for _ in range(steps):
                if seed == BOUNDARY:
                    plain.begin_stage(BETAS)
                    await group.begin_stage()
                rollouts, lr = make_rollouts(tiny_model, 7, K, seed), rate(seed + 1, LARGER)
                expected = plain.step(rollouts, lr)
                result = await group.train_step(rollouts)
                assert result.loss == pytest.approx(expected, rel=1e-5)
                seed += 1
            student, teacher = await group.parameters("student"), await group.parameters("teacher")
            assert_equal(student, teacher, plain, base)
            frozen = base.keys() - {f"{name.rsplit('.lora_', 1)[0]}.weight" for name in plain.adapters}
            assert all(np.array_equal(student[name], base[name]) for name in frozen)
            folder = await saved(group, tmp_path / str(seed))
            for worker in group.workers:
                worker.__ray_terminate__.remote()
        assert plain is not None
        held = {p.name for p in (folder / "student").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= held
        assert "model.safetensors" not in held

        # peft loads what was saved, and the export is the merged student.
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder / "student")
        merge_adapter(folder / "student", tmp_path / "out")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids = torch.tensor(PROBE).long()[None]
        with torch.no_grad():
            expected = torch.func.functional_call(plain.student, plain.merged(), (ids,)).logits
            for model in (loaded, exported):
                torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"

    asyncio.run(run())


def test_adapters_are_merged_on_their_device(tiny_model: Path) -> None:
    """On the GPU after a broadcast, here with the meta device instead."""
    name = "model.layers.0.mlp.down_proj."
    adapters = {name + DOWN: torch.empty(2, 128, device="meta"), name + UP: torch.empty(128, 2, device="meta")}
    assert {weight.device.type for _, weight in merged(tiny_model, adapters, 0.5, torch.float32)} == {"meta"}
