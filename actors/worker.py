"""Ray actor around an Engine. Sets up the process before the implementation is imported, then forwards calls."""

import asyncio
import os
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import ray

from sdft.actors.config import EngineSettings
from sdft.actors.engine import Engine, own_engine
from sdft.actors.held import fetched
from sdft.actors.shared.drafts import Completion, Scores
from sdft.actors.shared.own_code import is_own
from sdft.actors.shared.process import large_imports, openmp_wait_policy, scratch_folder
from sdft.actors.shared.types import (
    GenerateRequest,
    IntArray,
    Process,
    Rollout,
    Sampling,
    Snapshot,
    Support,
    TeacherScores,
    UpdateReport,
)

T = TypeVar("T")


def engine_environment(settings: EngineSettings) -> dict[str, str]:
    """Environment variables of an engine process."""
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if settings.execution == "eager" and settings.device == "cpu":
        # Despite eager execution vLLM compiles two small sampler functions with a C++ compiler: seconds of every start.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    if settings.tensor_parallel > 1:
        # As vLLM sets it in an actor. Else it would ask Ray in the engine's process, which is a fork (vllm/process.py).
        environment["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        environment["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] = "0"  # a worker that waits for a lost one does not end
    if "SDFT_SCRATCH" in os.environ:
        environment["TMPDIR"] = os.environ["SDFT_SCRATCH"]  # files of a killed engine are removed with the run
    if settings.device == "cpu":
        cores, parts = sorted(os.sched_getaffinity(0))[: settings.threads], settings.tensor_parallel
        environment |= openmp_wait_policy(settings.exclusive) | {
            # If unset, vLLM reserves one core. Workers would be bound, and those of two engines to the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)) if parts == 1 else "nobind",
            # Ray sets it to the CPUs of the actor: one thread. Each worker has its share.
            "OMP_NUM_THREADS": str(max(1, len(cores) // parts)),
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # the V2 runner needs Triton
            "VLLM_MLA_DISABLE": "1",  # latent attention by plain kernels: those for CPUs take no new weights
            # Allows the model to run inside the EngineCore process (the "uni" executor in vllm/engine.py). This saves
            # one process per engine and the shared-memory queues that a killed engine leaves behind. AsyncLLM starts
            # EngineCore as a separate process whatever the value.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return environment


def engine_class(name: str) -> type[Engine]:
    """Return the implementation of the engine interface with this name: "vllm", or a user's own. NotImportable."""
    if is_own(name):
        return own_engine(name)
    from sdft.actors.vllm.engine import VllmEngine  # imports vLLM, which reads the environment

    return VllmEngine


async def scored(
    engine: Engine, prompts: Sequence[IntArray], rollouts: Sequence[Rollout], support: Support
) -> list[TeacherScores]:
    """Score the completions of rollouts behind the teacher's prompts, at the tokens of a support."""
    completions = [rollout.completion_ids for rollout in rollouts]
    # Only where it is wanted, so that engines of a user's own need not take it.
    heat = {} if support.temperature == 1 else {"temperature": support.temperature}
    if support.of == "teacher":
        return await engine.score(list(zip(prompts, completions, strict=True)), support.k, **heat)
    if support.of == "full":
        assert engine.settings.vocabulary is not None, "an engine that trains knows the tokenizer's size"
        every = np.arange(engine.settings.vocabulary, dtype=np.int32)[None]
        return await engine.score_at([(*pair, every) for pair in zip(prompts, completions, strict=True)], 0, **heat)
    likely = [rollout.likely for rollout in rollouts if rollout.likely is not None]
    if len(likely) < len(rollouts):
        raise ValueError(
            f"support {support.of} needs the student's most likely tokens, and {len(rollouts) - len(likely)} of "
            f"{len(rollouts)} completions have none (Rollout.likely); set support: teacher or full"
        )
    items = list(zip(prompts, completions, likely, strict=True))
    return await engine.score_at(items, support.k if support.of == "union" else 0, **heat)


class EngineWorker:
    """One engine in its own process."""

    def __init__(self, settings: EngineSettings) -> None:
        # vLLM leaves sockets behind. After the engine has started, their names can be removed.
        self._scratch = ExitStack()
        folder = self._scratch.enter_context(scratch_folder("sdft-engine-", os.environ.get("SDFT_SCRATCH")))
        os.environ.update(engine_environment(settings) | {"VLLM_RPC_BASE_PATH": str(folder)})
        with large_imports():
            self._engine = engine_class(settings.engine)(settings)

    async def where(self) -> Process:
        return Process(os.getpid(), ray.get_runtime_context().get_node_id())

    async def start(self) -> None:
        """Load the model."""
        await self._engine.start()
        self._scratch.close()

    async def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        return await self._alive(self._engine.generate(requests, sampling))

    async def score(self, rollouts: Sequence[tuple[IntArray, IntArray]], k: int) -> list[TeacherScores]:
        return await self._alive(self._engine.score(rollouts, k))

    async def complete(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        """Generate, and keep the rollouts in this node's object store."""
        return [Completion.of(rollout, ray.put(rollout)) for rollout in await self.generate(requests, sampling)]

    async def score_completions(self, items: Sequence[tuple[IntArray, Completion]], support: Support) -> list[Scores]:
        """Score completions behind the teacher's prompts, and keep the scores in this node's object store.

        Raises CompletionLost if one cannot be fetched, and ValueError if it lacks tokens that the support is of.
        """
        rollouts = await fetched([completion.rollout for _, completion in items])
        prompts = [prompt for prompt, _ in items]
        found = await self._alive(scored(self._engine, prompts, rollouts, support))
        return [Scores(ray.put(scores), scores.version) for scores in found]

    async def probe(self, ids: IntArray) -> object:
        return await self._alive(self._engine.probe(ids))

    async def ping(self) -> None:
        """Return when this process and the engine's own process have answered (see VllmEngine.ping)."""
        await self._alive(self._engine.ping())

    async def update_weights(self, snapshot: Snapshot) -> UpdateReport:
        return await self._alive(self._engine.update_weights(snapshot), to_its_end=True)

    async def sleep(self) -> None:
        await self._alive(self._engine.sleep(), to_its_end=True)

    async def wake(self) -> None:
        await self._alive(self._engine.wake(), to_its_end=True)

    async def connect(self, place: Mapping[str, Any]) -> None:
        """Prepare for streams of weights. place: the transport's own."""
        await self._alive(self._engine.connect(place, ray.util.get_node_ip_address()))

    async def _alive(self, work: Awaitable[T], to_its_end: bool = False) -> T:
        """The result of `work`. Exits this process if the engine's own process has died.

        Callers thus see one kind of death. The check runs every second, because vLLM leaves some of the calls that
        its process had not answered waiting for ever.
        to_its_end: let the work finish even if the call is cancelled. Half-loaded weights could never be loaded again.
        """
        task = asyncio.ensure_future(work)
        try:
            while not task.done() and not self._engine.dead:
                await asyncio.wait([task], timeout=1)
        except asyncio.CancelledError:
            if to_its_end:
                task.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieves the exception
            else:
                task.cancel()
            raise
        if self._engine.dead:
            os._exit(1)
        return task.result()

    async def stop(self) -> None:
        await asyncio.to_thread(self._engine.stop)
