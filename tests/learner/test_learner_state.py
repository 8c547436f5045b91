"""The learner's state: resumed with other ranks and ZeRO stages, and an EMA teacher without drift."""

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdft.learner.checkpoint.saving import Saver, TensorFile
from sdft.learner.checkpoint.state import Piece, StateFiles, first_difference, state_files
from sdft.learner.group import LearnerGroup
from tests.fakes.reference import Reference
from tests.fakes.rollouts import make_rollouts
from tests.learner.test_learner_step import (
    ADAMW,
    ALPHA,
    BETAS,
    BOUNDARY,
    CLIP,
    PROBE,
    K,
    apart,
    assert_equal,
    rate,
    settings,
    spoiled,
    worst,
)


async def started(model: Path, stage: int, ranks: int, dtype: str = "float32") -> LearnerGroup:
    return await LearnerGroup.start(settings(model, stage, ranks, dtype), PROBE, [{"num_cpus": 0.5}] * ranks)


def stop(group: LearnerGroup) -> None:
    for worker in group.workers:
        worker.__ray_terminate__.remote()


def test_a_run_resumed_with_other_ranks_and_zero_stages_equals_the_run_of_one_process(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """1 rank at ZeRO stage 1, then 2 at 3, 2 at 2, 2 at 0. Every rank must restore moments, step count and EMA.

    The run's second stage begins after the second step. If ranks of ZeRO stage 0 step apart, the loss of the next step
    shows it.
    """
    plain = Reference(tiny_model, ALPHA, cap=2.0, clip=CLIP, **ADAMW)

    async def run() -> None:
        base = {n: p.detach().numpy().copy() for n, p in plain.student.named_parameters()}
        saved: Path | None = None
        student, seed = base, 0
        for stage, ranks, steps in [(1, 1, 1), (3, 2, 1), (2, 2, 1), (0, 2, 2)]:
            group = await started(tiny_model, stage, ranks)
            if saved is not None:
                assert await group.load(saved) == seed
            assert worst(await group.parameters("student"), student) == 0
            for _ in range(steps):
                if seed == BOUNDARY:
                    plain.begin_stage(BETAS)
                    await group.begin_stage()
                rollouts, lr = make_rollouts(tiny_model, 7, K, seed), rate(seed + 1)
                expected = plain.step(rollouts, lr)
                result = await group.train_step(rollouts)
                assert result.loss == pytest.approx(expected, rel=1e-5)
                assert result.lr == lr
                seed += 1
            student, teacher = await group.parameters("student"), await group.parameters("teacher")
            assert_equal(student, teacher, plain, base)
            assert apart(student, teacher) > 0.2 * apart(student, base)
            saved = tmp_path / str(seed)
            saved.mkdir()
            await group.save(saved)
            await group.written()
            stop(group)

    asyncio.run(run())


def test_bfloat16_weights_and_their_float32_masters_survive_a_resume(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        group = await started(tiny_model, 1, 1, "bfloat16")
        await group.train_step(make_rollouts(tiny_model, 7, K, 0))
        await group.train_step(spoiled(make_rollouts(tiny_model, 7, K, 2)))  # a step that AdamW does not count
        expected = {role: await group.parameters(role) for role in ("student", "teacher")}
        await group.save(tmp_path)  # the next step may begin before the files are written
        following = await group.train_step(make_rollouts(tiny_model, 7, K, 1))
        await group.written()
        stop(group)
        other = await started(tiny_model, 3, 2, "bfloat16")
        assert await other.load(tmp_path) == 2
        assert StateFiles(tmp_path).adam_steps == 1
        for role, parameters in expected.items():
            assert worst(await other.parameters(role), parameters) == 0
        result = await other.train_step(make_rollouts(tiny_model, 7, K, 1))
        assert result.loss == pytest.approx(following.loss, rel=2e-2)  # bfloat16, in other micro-batches
        stop(other)

    asyncio.run(run())


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_fifty_steps_the_teacher_is_the_float64_average(ray_cluster: None, tiny_model: Path, ranks: int) -> None:
    async def run() -> None:
        group = await started(tiny_model, 2, ranks)
        average = {n: p.astype(np.float64) for n, p in (await group.parameters("student")).items()}
        rollouts = make_rollouts(tiny_model, 4, K, 0)
        for _ in range(50):
            await group.train_step(rollouts)
            for name, p in (await group.parameters("student")).items():
                average[name] = ALPHA * p + (1 - ALPHA) * average[name]
        teacher, student = await group.parameters("teacher"), await group.parameters("student")
        stop(group)
        norm = np.sqrt(sum(np.square(p).sum() for p in average.values()))
        assert apart(teacher, average) < 1e-6 * norm
        assert apart(teacher, student) > 1e-4 * norm, "a teacher that is the student would show nothing"

    asyncio.run(run())


def write(folder: Path, rank: int, step: int, pieces: list[Piece]) -> None:
    for file in state_files(folder, rank, step, step, pieces):
        file.write()


def test_pieces_that_do_not_cover_a_tensor_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdft.learner.checkpoint.state.FILE_BYTES", 1)  # one file per tensor
    values = torch.arange(10, dtype=torch.float32)
    write(tmp_path, 0, 3, [Piece("master/w", 0, values[:4]), Piece("master/v", 0, torch.ones(2))])
    write(tmp_path, 1, 3, [Piece("master/w", 4, values[4:])])
    files = StateFiles(tmp_path)
    assert (files.step, files.names) == (3, ["master/v", "master/w"])
    assert torch.equal(files.whole("master/w", 10), values)
    (tmp_path / "rank-00001-00000.safetensors").unlink()
    with pytest.raises(ValueError, match="the pieces of master/w do not cover its 10 elements"):
        StateFiles(tmp_path).whole("master/w", 10)


def test_the_first_tensor_that_differs_is_named(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, last in ((one, 2.0), (other, 2.0000002)):
        folder.mkdir()
        write(folder, 0, 1, [Piece("master/a", 0, torch.ones(3)), Piece("master/b", 0, torch.tensor([last]))])
    assert first_difference(one, one) is None
    assert first_difference(one, other) == "master/b"


def test_tensors_that_are_not_written_yet_are_copied_before_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun, go_on = TensorFile.write, threading.Event(), threading.Event()

    def slowly(file: TensorFile) -> None:
        begun.set()
        assert go_on.wait(timeout=60)
        write(file)

    monkeypatch.setattr(TensorFile, "write", slowly)
    tensors = [torch.full((4,), float(i)) for i in range(3)]
    saver = Saver()
    saver.begin(TensorFile(tmp_path / f"{i}.safetensors", {"x": t}) for i, t in enumerate(tensors))
    assert begun.wait(timeout=60)
    threading.Timer(0.2, go_on.set).start()
    saver.detach()
    for t in tensors:
        t.fill_(-1)
    saver.finish()
    assert [load_file(tmp_path / f"{i}.safetensors")["x"][0].item() for i in range(3)] == [0, 1, 2]


def test_with_little_memory_tensors_are_written_out_instead_of_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = TensorFile.write

    def slowly(file: TensorFile) -> None:
        time.sleep(0.1)
        write(file)

    monkeypatch.setattr(TensorFile, "write", slowly)
    monkeypatch.setattr("sdft.learner.checkpoint.saving.available_memory_gib", lambda: 0.0)
    saver = Saver()
    saver.begin(TensorFile(tmp_path / f"{i}.safetensors", {"x": torch.ones(4)}) for i in range(4))
    waiting = threading.Thread(target=saver.finish)  # as a run does from the moment it saves
    waiting.start()
    time.sleep(0.05)
    saver.detach()
    written = sorted(path.name for path in tmp_path.iterdir())
    waiting.join(timeout=60)
    assert written == [f"{i}.safetensors" for i in range(4)]


def test_a_file_that_cannot_be_written_is_an_error_of_the_save(tmp_path: Path) -> None:
    saver = Saver()
    saver.begin([TensorFile(tmp_path / "no" / f"{i}.safetensors", {"x": torch.ones(1)}) for i in range(2)])
    with pytest.raises(OSError, match="No such file"):
        saver.finish()
    saver.finish()
