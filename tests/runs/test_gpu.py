"""What differs between GPU and CPU, on a GPU: attention, the loss, the learner, snapshots, runs on one shared GPU.

    .venv/bin/pytest tests/runs/test_gpu.py

Skipped if torch finds no GPU. No other test uses one.
"""

import asyncio
import json
import multiprocessing
import subprocess
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.loss import inputs
from sdft.actors.shared.compat import share
from sdft.actors.shared.packed import unpack
from sdft.actors.shared.pinned import PinnedFile
from sdft.actors.shared.sums import damaged, sum_digests
from sdft.actors.shared.types import Handle, TensorEntry
from sdft.actors.transport.ipc import opened
from sdft.learner.config import LossConfig
from sdft.learner.group import LearnerGroup
from sdft.learner.loss.chunked import divergence_loss
from sdft.learner.model.attention import packed_attention
from sdft.learner.model.cpu.norm import replace_norms
from sdft.learner.weights.buffers import GpuMemory, HostMemory
from sdft.services.records.batches import read_batch
from sdft.services.records.rows import read_jsonl
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import PROBE, K, apart, settings
from tests.runs.leftovers import new_since, on_machine
from tests.runs.run import command, finish, metrics, wait_for_step, write_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SHARED = {"gpus": 0.3, "kv_cache_gib": 1}  # share of one GPU that all processes of a run use


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the relative distance |ours - theirs| / |theirs|, in float64."""
    theirs = theirs.double().cpu()
    return float((ours.double().cpu() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("lengths", [(5, 7, 9), (1, 1, 90), (300, 2, 280)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_attention_of_packed_sequences_is_that_of_each_alone(
    lengths: tuple[int, ...], dtype: torch.dtype, bound: float
) -> None:
    """Value and gradients, compared with float64 on the CPU."""
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 6, sum(lengths), 64), (1, 2, sum(lengths), 64), (1, 2, sum(lengths), 64))
    given = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    direction = torch.randn(1, sum(lengths), 6, 64, generator=g)
    found = []
    for device, precision in (("cuda", dtype), ("cpu", torch.float64)):
        here = [x.to(device, precision).requires_grad_() for x in given]
        out = attention_of(here, lengths)
        out.backward(direction.to(device, precision))
        found.append([out.detach(), *(x.grad for x in here if x.grad is not None)])
    assert [len(each) for each in found] == [4, 4]
    assert max(relative(ours, theirs) for ours, theirs in zip(*found, strict=True)) < bound


def test_gradients_of_long_sequences_are_the_same_bits_each_time() -> None:
    """Many blocks add to one gradient, in arbitrary order unless the kernel is deterministic. The learner sets that."""
    g = torch.Generator().manual_seed(0)
    lengths = (3000, 1, 5191)
    shapes = ((1, 9, sum(lengths), 64), (1, 3, sum(lengths), 64), (1, 3, sum(lengths), 64))
    given = [torch.randn(shape, generator=g).to("cuda", torch.bfloat16).requires_grad_() for shape in shapes]
    direction = torch.randn(1, sum(lengths), 9, 64, generator=g).to("cuda", torch.bfloat16)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        found = [torch.autograd.grad(attention_of(given, lengths), given, direction) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(first, again) for other in found[1:] for first, again in zip(found[0], other, strict=True))


def attention_of(given: list[torch.Tensor], lengths: tuple[int, ...]) -> torch.Tensor:
    return packed_attention(torch.nn.Module(), given[0], given[1], given[2], None, lengths=lengths)[0]


def test_the_loss_and_both_gradients_are_those_of_a_cpu() -> None:
    """In float32, over several chunks."""
    found = []
    for device in ("cuda", "cpu"):
        hidden, head, targets = inputs(2048, "cpu")
        hidden, head = (x.detach().float().to(device).requires_grad_() for x in (hidden, head))
        loss = divergence_loss(hidden, head, None, targets.to(device), LossConfig())[0]
        loss.backward()
        found.append([loss.detach(), hidden.grad, head.grad])
    assert max(relative(ours, theirs) for ours, theirs in zip(*found, strict=True)) < 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_a_norm_is_that_of_a_cpu_in_value_and_gradients(dtype: torch.dtype, bound: float) -> None:
    """Compared with float64, by the models' own class."""
    g = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(500, 576, generator=g).to(dtype) for _ in range(2))
    weight = (1 + 0.3 * torch.randn(576, generator=g)).to(dtype)
    found = []
    for device, precision in (("cuda", dtype), ("cpu", torch.float64)):
        norm = LlamaRMSNorm(576, eps=1e-5)
        norm.weight.data = weight.to(precision)
        if device == "cuda":
            assert replace_norms(norm) == 1
        norm.to(device)
        here = x.to(device, precision).requires_grad_()
        out = norm(here)
        out.backward(direction.to(device, precision))
        found.append([out.detach(), here.grad, norm.weight.grad])
    assert max(relative(ours, theirs) for ours, theirs in zip(*found, strict=True)) < bound


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_steps_are_those_of_a_cpu(ray_cluster: None, tiny_model: Path, stage: int) -> None:
    """In float32, with the EMA teacher. The difference is small compared with the change. A repeated run has the same
    bits."""

    async def run(device: str) -> list[dict]:
        asked = {"num_cpus": 0.5, "num_gpus": 1 if device == "cuda" else 0}
        given = replace(settings(tiny_model, stage, 1), device=device)
        group = await LearnerGroup.start(given, PROBE, [asked])
        before = await group.parameters("student")
        for seed in range(2):
            await group.train_step(make_rollouts(tiny_model, 7, K, seed))
        after = [before, await group.parameters("student"), await group.parameters("teacher")]
        group.kill()
        return after

    (before, *there), (_, *again), (_, *here) = (asyncio.run(run(d)) for d in ("cuda", "cuda", "cpu"))
    for ours, same, theirs in zip(there, again, here, strict=True):
        assert apart(ours, theirs) < 1e-3 * apart(theirs, before)
        assert all((ours[name] == same[name]).all() for name in ours)


GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    """Return tensors on the GPU, of odd sizes and of more than one block of sums, with another value for each seed."""
    g = torch.Generator(GPU).manual_seed(seed)
    shapes = ((3,), (1000, 1001), (), (0, 4), (3000, 1500), (7,))
    return [(f"t{i}", torch.randn(s, generator=g, device=GPU).to(torch.bfloat16)) for i, s in enumerate(shapes)]


def test_weights_on_a_gpu_are_published_as_those_of_a_cpu() -> None:
    """Into pinned memory, with the same bytes and digests, and by sums, which are those that a CPU computes."""
    given = weights(0)
    nbytes = sum(tensor.nbytes for _, tensor in given)
    pinned, plain, ours = HostMemory("a", nbytes, GPU), HostMemory("b", nbytes, CPU), GpuMemory(nbytes, GPU)
    for seed in range(3):
        version = weights(seed)
        assert pinned.fill(version) == plain.fill([(name, tensor.cpu()) for name, tensor in version])
        assert torch.equal(pinned.payload, plain.payload)
        entries = ours.fill(version)
        assert torch.equal(ours.payload.cpu(), plain.payload)
        assert [e.digest for e in entries] == sum_digests(plain.payload, entries)
    pinned.close()


def test_a_file_stays_pinned_until_another_one_comes() -> None:
    memories = [HostMemory(name, 1 << 20, CPU) for name in ("a", "b")]
    pinned = PinnedFile()
    maps: list[memoryview] = []
    for memory in (memories[0], memories[0], memories[1]):
        memory.payload.fill_(len(maps))
        with open(memory.path, "rb") as file:
            maps.append(pinned.map(file))
        there = torch.frombuffer(maps[-1], dtype=torch.uint8)
        assert torch.equal(there.to(GPU).cpu(), memory.payload)
    assert maps[0] is maps[1] is not maps[2]
    pinned.close()


def as_an_engine(handle: Handle, entries: Sequence[TensorEntry]) -> tuple[str | None, list[torch.Tensor]]:
    """Return what a process finds in memory that another one has shared."""
    payload = opened(handle, GPU)
    return damaged(payload, entries), [tensor.clone().cpu() for _, tensor in unpack(payload, entries)]


def test_another_process_reads_each_version_in_the_learners_memory_and_no_file_stays_behind() -> None:
    before = on_machine()
    memory = GpuMemory(sum(tensor.nbytes for _, tensor in weights(0)), GPU)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as engine:
        for seed in range(3):
            version = weights(seed)
            entries = memory.fill(version)
            if seed == 0:
                handle = share(memory.payload)
                assert new_since(before) == set()
            wrong, there = engine.submit(as_an_engine, handle, entries).result(timeout=120)
            assert wrong is None
            assert all(torch.equal(one, tensor.cpu()) for one, (_, tensor) in zip(there, version, strict=True))
        memory.payload[entries[1].offset] ^= 1
        torch.cuda.synchronize()
        assert engine.submit(as_an_engine, handle, entries).result(timeout=120)[0] == "t1"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A strict run in bfloat16, entirely on one GPU."""
    path = write_run(tmp_path_factory.mktemp("gpu"), tiny_model, "bfloat16")
    given = yaml.safe_load(path.read_text())
    given |= {"device": "cuda", "actors": {"student": SHARED, "teacher": SHARED}}
    given["learner"] |= {"gpus": 0.4}
    path.write_text(yaml.safe_dump(given))
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    run_dir = config.with_name("whole")
    finish(config, run_dir)
    return run_dir


def test_a_run_on_one_gpu_accounts_for_every_sample(whole: Path) -> None:
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [r["trained"] for r in rows] == [4 * (i + 1) for i in range(6)]
    assert rows[0]["divergence"] > 0
    assert max(abs(r["mismatch_kl"]) for r in rows) < 1e-2
    assert json.loads((whole / "run.json").read_text())["state"] == "finished"


def test_a_run_whose_weights_stay_on_the_gpu_has_the_same_results(config: Path, whole: Path) -> None:
    before, run_dir = on_machine(), config.with_name("ipc")
    finish(config, run_dir, "weights.transport=ipc")
    assert metrics(run_dir) == metrics(whole)
    assert new_since(before) == set()


@pytest.mark.parametrize("support", ["student", "union"])
def test_the_teacher_scores_the_students_tokens(config: Path, support: str) -> None:
    """By vLLM's own scoring of given tokens, which its runner on a GPU has and that on a CPU has not."""
    run_dir = config.with_name(support)
    finish(config, run_dir, "training.steps=2", f"method.divergence.support={support}", "method.divergence.top_k=8")
    for sequence in read_batch(run_dir, 1):
        assert sequence.teacher is not None
        assert sequence.teacher.ids.shape[1] == (16 if support == "union" else 8)
        assert all(len(set(row)) == len(row) for row in sequence.teacher.ids.tolist())
        at = sequence.teacher.ids == sequence.token_ids[sequence.loss_mask][:, None]
        assert at.any()
        own = np.broadcast_to(sequence.teacher.sampled[:, None], at.shape)[at]
        np.testing.assert_allclose(sequence.teacher.logprobs[at], own, atol=1e-3)
        assert (np.exp(sequence.teacher.logprobs).sum(1) < 1 + 1e-3).all()


def test_a_killed_and_continued_run_has_the_same_results(config: Path, whole: Path) -> None:
    before, run_dir = on_machine(), config.with_name("killed")
    with run_dir.with_suffix(".log").open("wb") as log:
        driver = subprocess.Popen(command(config, run_dir), stdout=log, stderr=log)
        wait_for_step(3, run_dir, driver)
        driver.kill()
        driver.wait(timeout=60)
    finish(config, run_dir)
    assert metrics(run_dir) == metrics(whole)
    assert new_since(before) == set()


def test_rollouts_go_on_while_the_learner_steps(config: Path) -> None:
    run_dir = config.with_name("ahead")
    finish(config, run_dir, "training.max_staleness=2", "training.steps=12", "sampling.generations=2")
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [r["trained"] for r in rows] == [8 * (i + 1) for i in range(12)]
    assert max(r["staleness_max"] for r in rows) <= 2
    assert {r["dropped"] for r in rows} == {0}
