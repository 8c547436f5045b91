"""An engine that is split over two processes: its log-probs, its updates, and what it leaves behind."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.exceptions import RayActorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sdft.actors.config import EngineSettings
from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import GenerateRequest, NotReceived, Rollout, Support, TeacherScores, WeightMismatch
from sdft.actors.worker import EngineWorker, engine_environment
from sdft.learner.weights.content import Content
from sdft.learner.weights.publisher import Publisher
from tests.actors.vllm.test_engine import PLAIN, PROBE, PROMPT, TEACHER_PROMPT, changed, content, engine_settings
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS, make_tiny_model
from tests.runs.leftovers import SHARED, on_machine

REQUESTS = [GenerateRequest(PROMPT[: 10 + 3 * i], 100 + i) for i in range(5)]


def split(model: Path, parts: int = 2) -> EngineSettings:
    """The settings of an engine that hides the rows of the head that are no tokens."""
    settings = replace(engine_settings(model), transport="memory", vocabulary=TOKENS)
    return replace(settings, tensor_parallel=parts, threads=parts)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("pairs"), pairs=2)


@pytest.fixture(scope="module")
def engines(ray_cluster: None, tiny_model: Path) -> Iterator[list]:
    """An engine of one process, and one of two workers."""
    actor = ray.remote(EngineWorker).options(num_cpus=0.5)
    both = [actor.remote(split(tiny_model, parts)) for parts in (1, 2)]
    ray.get([e.start.remote() for e in both], timeout=300)
    yield both
    ray.get([e.stop.remote() for e in both], timeout=60)


@pytest.fixture
def own(ray_cluster: None, tiny_model: Path) -> Any:
    """An engine of two workers for one test."""
    engine = ray.remote(EngineWorker).options(num_cpus=0.5).remote(split(tiny_model))
    ray.get(engine.start.remote(), timeout=300)
    return engine


def publisher(model: Path) -> Publisher:
    return Publisher(model, torch.float32, PROBE, "", TOKENS)


def sampled(engine: Any) -> list[Rollout]:
    return ray.get(engine.generate.remote(REQUESTS, replace(PLAIN, likely=4)), timeout=120)


def scored(engine: Any, rollouts: list[Rollout], support: Support) -> list[TeacherScores]:
    """Score the rollouts behind another prompt, as a run does."""
    from sdft.actors.shared.drafts import Completion

    items = [(TEACHER_PROMPT, Completion.of(rollout, ray.put(rollout))) for rollout in rollouts]
    return ray.get([s.scores for s in ray.get(engine.score_completions.remote(items, support), timeout=120)])


def below(engine: Any) -> list[psutil.Process]:
    """The processes of an engine below its actor."""
    return psutil.Process(ray.get(engine.where.remote()).pid).children(recursive=True)


def named(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    return [process for process in processes if "".join(process.cmdline()).startswith(f"VLLM::{name}")]


def eventually(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within 30 s."""
    deadline = time.monotonic() + 30
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


def left(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def shared_memory() -> set[str]:
    return {line for line in on_machine() if line.startswith("shared memory")}


def test_the_workers_of_an_engine_share_its_threads(tiny_model: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    given = [replace(split(tiny_model, parts), threads=threads) for parts, threads in ((1, 1), (2, 2), (2, None))]
    threads = [engine_environment(settings)["OMP_NUM_THREADS"] for settings in given]
    assert threads == ["1", str(max(1, min(cores, 2) // 2)), str(max(1, cores // 2))]


def test_the_model_is_in_two_workers_and_no_name_of_shared_memory_is_left(engines: list) -> None:
    """A kill at any time after the start leaves nothing in /dev/shm."""
    processes = below(engines[1])
    assert len(named(processes, "EngineCore")) == 1
    assert len(named(processes, "VllmWorker")) == 2
    assert not [path.name for path in SHARED.iterdir() if path.name.startswith("psm_") or "cpushm" in path.name]


def test_sampled_log_probs_are_those_of_a_whole_engine(engines: list, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rollouts = [sampled(engine) for engine in engines]
    apart = 0.0
    for one, two in zip(*rollouts, strict=True):
        assert one.completion_ids.tolist() == two.completion_ids.tolist()
        assert one.likely.tolist() == two.likely.tolist()
        assert two.completion_ids.max() < TOKENS
        expected = logprobs(model, two.prompt_ids, two.completion_ids, TOKENS)
        own = torch.tensor(two.completion_ids).long()[:, None]
        np.testing.assert_allclose(two.logprobs, expected.gather(1, own)[:, 0], atol=1e-4)
        apart = max(apart, float(np.abs(one.logprobs - two.logprobs).max()))
    print(f"sampled log-probs of 2 workers and of 1 process: at most {apart:.1e} apart")
    assert apart < 1e-4


@pytest.mark.parametrize("heat", [1.0, 0.5])
@pytest.mark.parametrize("of", ["teacher", "student", "union", "full"])
def test_the_scores_of_each_support_are_those_of_a_whole_engine(engines: list, of: Any, heat: float) -> None:
    rollouts = sampled(engines[0])
    support = Support(of, 0 if of == "full" else 4, heat)
    apart = 0.0
    for one, two in zip(*(scored(engine, rollouts, support) for engine in engines), strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        assert two.ids.max() < TOKENS
        assert two.ids.shape[1] == support.width(TOKENS)
        apart = max(apart, float(np.abs(one.logprobs - two.logprobs).max()))
        apart = max(apart, float(np.abs(one.sampled - two.sampled).max()))
    print(f"scores of support {of} at temperature {heat:g}: at most {apart:.1e} apart")
    assert apart < 1e-4


def test_equal_batches_have_equal_bits(engines: list) -> None:
    first, again = (sampled(engines[1]) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a.completion_ids.tolist() == b.completion_ids.tolist()
        assert a.logprobs.tobytes() == b.logprobs.tobytes()


def test_each_of_three_updates_is_loaded_and_verified(engines: list, tiny_model: Path) -> None:
    """The second is of adapters, which each worker merges into its part."""
    for version in (0, 1, 2, 3):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        if version == 2:
            sent = with_adapters(model)
        else:
            model = changed(tiny_model, seed=version) if version else model
            sent = content(model)
        snapshot = publisher(tiny_model).publish("student", version, sent)
        report = ray.get(engines[1].update_weights.remote(snapshot), timeout=120)
        print(f"weights v{version}: gap {report.probe_gap:.1e}, pause {report.pause_s:.2f} s")
        assert report.version == version
        assert report.probe_gap < 1e-4
        for rollout in sampled(engines[1]):
            own = torch.tensor(rollout.completion_ids).long()[:, None]
            expected = logprobs(model, rollout.prompt_ids, rollout.completion_ids, TOKENS).gather(1, own)[:, 0]
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)
            assert rollout.versions == ((version, 0, len(own)),)


def with_adapters(model: torch.nn.Module) -> Content:
    """Add adapters to the model's linear layers, and return them."""
    torch.manual_seed(2)
    adapters: dict[str, torch.Tensor] = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            down, up = torch.randn(4, module.in_features) / 8, torch.randn(module.out_features, 4) / 8
            module.weight.data += 0.5 * up @ down
            adapters |= {f"model.layers.{name}.lora_A.weight": down, f"model.layers.{name}.lora_B.weight": up}
    return Content(adapters.items(), sum(a.nbytes for a in adapters.values()), 0.5)


def test_weights_that_are_not_the_learners_are_refused(engines: list, tiny_model: Path) -> None:
    snapshot = publisher(tiny_model).publish("student", 8, content(changed(tiny_model, seed=8)))
    wrong = replace(snapshot, probe_logprobs=snapshot.probe_logprobs - 1)
    with pytest.raises(WeightMismatch, match="student weights v8"):
        ray.get(engines[1].update_weights.remote(wrong), timeout=120)


def test_weights_that_cannot_be_loaded_are_named_and_later_ones_are_loaded(engines: list, tiny_model: Path) -> None:
    """Both workers fail. Neither answer may be taken for that to the next call."""
    model = changed(tiny_model, seed=9)
    named = [*model.named_parameters(), ("model.layers.0.surplus", torch.zeros(4))]
    snapshot = publisher(tiny_model).publish("student", 9, Content(named, sum(p.nbytes for _, p in named)))
    with pytest.raises(RuntimeError) as raised:
        ray.get(engines[1].update_weights.remote(snapshot), timeout=120)
    said = reason(raised.value)
    assert re.fullmatch(r"student weights v9: \w+Error: .*surplus.*", said)
    assert "above" not in said
    for version in (10, 11):
        snapshot = publisher(tiny_model).publish("student", version, content(model))
        assert ray.get(engines[1].update_weights.remote(snapshot), timeout=120).version == version
    sampled(engines[1])


def test_a_stream_of_weights_is_refused(engines: list) -> None:
    with pytest.raises(NotReceived, match="several processes"):
        ray.get(engines[1].connect.remote({}), timeout=60)


def test_an_engine_whose_worker_hangs_answers_no_health_check(engines: list) -> None:
    ray.get(engines[1].ping.remote(), timeout=60)
    worker = named(below(engines[1]), "VllmWorker-1")[0]
    worker.suspend()
    try:
        answer = engines[1].ping.remote()
        assert ray.wait([answer], timeout=3)[0] == []
    finally:
        worker.resume()
    ray.get(answer, timeout=60)


@pytest.mark.whole
@pytest.mark.parametrize("ended", ["actor", "EngineCore", "VllmWorker-1"])
def test_nothing_is_left_when_a_process_is_killed(own: Any, ended: str) -> None:
    before, processes = shared_memory(), below(own)
    assert len(processes) >= 3
    pid = ray.get(own.where.remote()).pid if ended == "actor" else named(processes, ended)[0].pid
    working = own.generate.remote(REQUESTS, replace(PLAIN, max_new_tokens=200))
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RayActorError):
        ray.get(working, timeout=60)
    assert eventually(lambda: left(processes) == []), left(processes)
    assert shared_memory() <= before


@pytest.mark.whole
def test_nothing_is_left_of_an_engine_that_is_killed_while_it_starts(ray_cluster: None, tiny_model: Path) -> None:
    before = shared_memory()
    engine = ray.remote(EngineWorker).options(num_cpus=0.5).remote(split(tiny_model))
    actor = psutil.Process(ray.get(engine.where.remote(), timeout=300).pid)
    starting = engine.start.remote()
    assert eventually(lambda: len(named(actor.children(recursive=True), "VllmWorker")) == 2)
    processes = actor.children(recursive=True)
    assert eventually(lambda: shared_memory() > before)
    actor.kill()
    with pytest.raises(RayActorError):
        ray.get(starting, timeout=60)
    assert eventually(lambda: left(processes) == []), left(processes)
    assert eventually(lambda: shared_memory() <= before), shared_memory()


def test_nothing_is_left_when_an_engine_is_stopped(own: Any) -> None:
    before, processes = shared_memory(), below(own)
    ray.get(own.stop.remote(), timeout=60)
    assert eventually(lambda: named(left(processes), "") == []), left(processes)
    ray.kill(own)
    assert eventually(lambda: left(processes) == []), left(processes)
    assert shared_memory() <= before


@pytest.mark.whole
def test_an_engine_that_cannot_start_says_what_a_worker_raised(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.0.surplus": torch.zeros(4)}, folder / "model.safetensors", {"format": "pt"})
    engine = ray.remote(EngineWorker).options(num_cpus=0.5).remote(split(folder))
    with pytest.raises(RuntimeError) as raised:
        ray.get(engine.start.remote(), timeout=300)
    said = reason(raised.value)
    assert re.fullmatch(rf"vLLM cannot start with {folder}: \w+Error: .*surplus.*", said), said
