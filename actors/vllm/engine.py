"""The engine interface on vLLM: rollouts, teacher scores, verified weight updates. Drives vLLM's AsyncLLM.

    engine = VllmEngine(settings); await engine.start()
    rollouts = await engine.generate(requests, sampling)       # token ids in, token ids and log-probs out
    scores = await engine.score([(teacher_ids, completion_ids)], k)
    report = await engine.update_weights(snapshot)              # raises WeightMismatch if the engine disagrees

With settings.hold_batches the engine pauses, enqueues the whole batch and then resumes. The scheduler sees the same
batch in every run, so tokens and log-probs are equal bit for bit, however slowly the requests arrive. Without it many
calls of one or a few sequences share the engine, and each joins the running batch as it arrives.

With settings.tensor_parallel the model is split over several workers. Each computes the same logits, of which the first
one's are used, and loads its part of every snapshot.

With settings.share_prompts a prompt that several sequences begin with is computed once, unless a layer carries a state
along the prompt. It is kept until the next held batch or the next weights, because a pause empties vLLM's cache.
"""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from sdft.actors.config import EngineSettings
from sdft.actors.engine import Engine
from sdft.actors.shared.agreement import Agreement
from sdft.actors.shared.digests import check_digests, damage
from sdft.actors.shared.pinned import mapped
from sdft.actors.shared.types import (
    ExpertArray,
    FloatArray,
    GenerateRequest,
    IntArray,
    NotReceived,
    Rollout,
    Sampling,
    Snapshot,
    TeacherScores,
    UpdateReport,
)
from sdft.actors.transport.named import transport_class
from sdft.actors.vllm.arguments import arguments, returns_experts
from sdft.actors.vllm.compat import Output, enqueue, keep_prompts_as_arrays
from sdft.actors.vllm.compat_processes import rpc_error, take_all_answers
from sdft.actors.vllm.experts import Parts, assembled, fill, returned
from sdft.actors.vllm.process import EngineProcess, error_line, forked
from sdft.actors.vllm.sampling import rollout_of, sampling_request
from sdft.actors.vllm.scoring import scores_of, scoring_request

keep_prompts_as_arrays()
take_all_answers()


class VllmEngine(Engine):
    """AsyncLLM behind an interface of wire types. All methods must run in the event loop that `start` ran in."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self._turn = asyncio.Lock()  # one batch at a time: the composition of a batch must not depend on timing
        self._pausing = asyncio.Lock()  # the task that pauses the engine also resumes it
        self._incomplete = False  # an update failed midway: nothing may be computed until complete weights are loaded
        self._agreement = Agreement(settings.max_probe_gap, settings.shared)
        self._router_layers: list[int] = []  # of the V2 runner, if it returns experts
        self._receiver = transport_class(settings.transport).receiver()

    async def start(self) -> None:
        """Load the model in a process that vLLM starts. Raises RuntimeError with the cause if vLLM cannot start."""
        processes: list[EngineProcess] = []
        made = arguments(self.settings)
        try:
            # A process that has used CUDA cannot be forked. The actor's has not, unless the platform used it at import.
            with nullcontext() if torch.cuda.is_initialized() else forked(processes):
                self._llm = AsyncLLM.from_engine_args(made)
        except Exception as error:
            # vLLM's text only refers to a log. The error of its process is in `EngineProcess.failure`.
            causes = [process.failure for process in processes if process.failure]
            raise RuntimeError(
                f"vLLM cannot start with {self.settings.model}: {causes[0] if causes else error_line(error)}"
            ) from error
        await self._llm.collective_rpc("score_completions_only")
        if returns_experts(self.settings):
            self._router_layers = (await self._llm.collective_rpc("router_layers"))[0]  # the same of each worker
        elif self.settings.keep_experts:
            await self._llm.collective_rpc("keep_experts")
        if self.settings.vocabulary is not None:
            await self._llm.collective_rpc("hide_rows", args=(self.settings.vocabulary,))
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest({"transport": self.settings.transport}))
        await self._llm.update_weight_version("0")

    async def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        """Complete each prompt. Returns rollouts in the order of the requests."""
        named = self.settings.keep_experts and not returns_experts(self.settings)
        names = [uuid.uuid4().hex if named else None for _ in requests]
        params = [
            sampling_request(sampling, request.seed, self.settings.stop_ids, name)
            for request, name in zip(requests, names, strict=True)
        ]
        try:
            outputs = await self._run([r.prompt_ids for r in requests], params)
        finally:
            kept = await self._experts(names)
        rollouts = [rollout_of(r.prompt_ids, o, sampling.likely) for r, o in zip(requests, outputs, strict=True)]
        if not self.settings.keep_experts:
            return rollouts
        lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
        experts: list[ExpertArray | None]
        if named:
            experts = [assembled(parts, length) for parts, length in zip(kept, lengths, strict=True)]
            fill([r.prompt_ids for r in rollouts], experts)
        else:
            layers = self._router_layers
            experts = [returned(output, layers, length) for output, length in zip(outputs, lengths, strict=True)]
        return [replace(rollout, experts=of_it) for rollout, of_it in zip(rollouts, experts, strict=True)]

    async def _experts(self, names: Sequence[str | None]) -> list[Parts]:
        """Take what was kept for the requests with these names; nothing for those without one."""
        if None in names or self.dead:
            return [[] for _ in names]
        return list((await self._llm.collective_rpc("experts_of", args=(names,)))[0])  # the same of each worker

    async def score(
        self, pairs: Sequence[tuple[IntArray, IntArray]], k: int, temperature: float = 1.0
    ) -> list[TeacherScores]:
        """Score each completion after its (teacher) prompt: top-k log-probs and those of the completion's own tokens.

        pairs: (prompt ids [P], completion ids [T]). The sampling temperature has no effect.
        """
        params = [scoring_request(len(prompt), k, temperature=temperature) for prompt, _ in pairs]
        outputs = await self._run([np.concatenate(pair) for pair in pairs], params)
        return [scores_of(o, len(c)) for (_, c), o in zip(pairs, outputs, strict=True)]

    async def score_at(
        self, items: Sequence[tuple[IntArray, IntArray, IntArray]], k: int, temperature: float = 1.0
    ) -> list[TeacherScores]:
        """Score given tokens at each completion token, and the top k of the others, as Engine.score_at says."""
        params = [
            scoring_request(len(prompt), ids.shape[1] + k, ids, temperature=temperature) for prompt, _, ids in items
        ]
        outputs = await self._run([np.concatenate((prompt, c)) for prompt, c, _ in items], params)
        return [scores_of(o, len(c)) for (_, c, _), o in zip(items, outputs, strict=True)]

    async def probe(self, ids: IntArray) -> FloatArray:
        """Log-prob of every token of `ids` [N] after the first: [N - 1]."""
        # The probe does not take the turn lock, so an update is verified at once, even during a long batch.
        (output,) = await self._together([ids], [scoring_request(1, 1)])
        return scores_of(output, len(ids) - 1).sampled

    async def update_weights(self, snapshot: Snapshot) -> UpdateReport:
        """Replace the weights and verify them: digest of every tensor before, log-probs of the probe after.

        Requests in flight are kept and continue with the new weights. Raises FileNotFoundError if the snapshot is gone,
        and SnapshotDamaged naming the tensor whose bytes are wrong. Both leave the weights untouched. Raises
        WeightMismatch with the gap of the log-probs. Raises RuntimeError if the weights cannot be loaded; the engine
        then computes nothing until a later update succeeds.

        A snapshot with a handle is in GPU memory, and the worker checks its digests there. Raises NotReceived if the
        worker cannot open that memory, which leaves the weights untouched.

        A snapshot without both is streamed (`connect`). The transport then checks what arrives. Raises NotReceived if
        it does not arrive complete; the engine computes nothing until a later update succeeds.
        """
        await self._probe_before(snapshot)
        if snapshot.handle:
            await self._check_handle(snapshot)
            async with self._paused() as since:
                await self._load(snapshot, RuntimeError, handle=list(snapshot.handle))
            return await self._verified(snapshot, since)
        if not snapshot.path:
            async with self._paused() as since:
                await self._load(snapshot, NotReceived)
            return await self._verified(snapshot, since)
        # The open file keeps the memory if the learner ends before the snapshot is loaded.
        with await asyncio.to_thread(self._receiver.receive, snapshot) as file:
            # In a thread, before the pause, so that generation continues.
            await asyncio.to_thread(check_digests, snapshot, mapped(file), self.settings.threads)
            async with self._paused() as since:
                await self._load(snapshot, RuntimeError, path=f"/proc/{os.getpid()}/fd/{file.fileno()}")
        return await self._verified(snapshot, since)

    async def connect(self, place: Mapping[str, Any], own_address: str) -> None:
        """Prepare for streams of weights. place: the transport's own. own_address: address of this machine.

        Raises NotReceived if the transport cannot connect, and for an engine that is split: a stream has one receiver.
        """
        if self.settings.tensor_parallel > 1:
            raise NotReceived("the weights of this engine are in several processes, and a stream has one receiver")
        with _passed_on(NotReceived, "the connection for weights"):
            request = WeightTransferInitRequest({"place": dict(place), "own_address": own_address})
            await self._llm.init_weight_transfer_engine(request)

    async def _check_handle(self, snapshot: Snapshot) -> None:
        with _passed_on(NotReceived, f"{snapshot.role} weights v{snapshot.version}"):
            given = list(snapshot.handle), [astuple(t) for t in snapshot.tensors]
            names = await self._llm.collective_rpc("first_damaged", args=given)
        for name in filter(None, names):
            raise damage(snapshot, name)

    async def _load(self, snapshot: Snapshot, failure: type[Exception], **how: object) -> None:
        """Load weights inside `_paused`. The pause continues if the load fails. failure: the type raised then."""
        entries = [astuple(t) for t in snapshot.tensors]
        self._incomplete = True
        with _passed_on(failure, f"{snapshot.role} weights v{snapshot.version}"):
            await self._llm.start_weight_update()
            update = {"entries": entries, "scale": snapshot.scale, "base": snapshot.base} | how
            await self._llm.update_weights(WeightTransferUpdateRequest(update))
            await self._llm.finish_weight_update(weight_version=str(snapshot.version))
        self._incomplete = False

    async def _probe_before(self, snapshot: Snapshot) -> None:
        """Probe before the first update. Raises WeightMismatch if the engine as loaded disagrees with the learner."""
        if self._agreement.untried:
            self._agreement.before_first(snapshot, await self.probe(snapshot.probe_ids))

    async def _verified(self, snapshot: Snapshot, since: float) -> UpdateReport:
        """Report on an update whose pause began at `since`, on the monotonic clock.

        Raises WeightMismatch if the engine disagrees with the learner, or with its own log-probs before the update.
        """
        pause_s = time.monotonic() - since
        gap = self._agreement.after(snapshot, await self.probe(snapshot.probe_ids))
        return UpdateReport(snapshot.version, gap, pause_s)

    async def sleep(self) -> None:
        """Move the weights to the host's memory, and drop the cache. No request is in flight."""
        await self._llm.sleep(level=1)

    async def wake(self) -> None:
        """Move the weights back. An engine that is awake only logs the call."""
        await self._llm.wake_up()

    async def ping(self) -> None:
        """Return when each process of the engine has answered a call, which it does after the step in progress."""
        await self._llm.collective_rpc("check_health")

    @property
    def client(self) -> AsyncLLM:
        """vLLM's own client of this engine, for its OpenAI server."""
        return self._llm

    @property
    def dead(self) -> bool:
        """Whether the engine's own process has ended. It then answers no calls."""
        return self._llm.errored

    def stop(self) -> None:
        """Kill the engine's processes. A clean exit would spend seconds on garbage collection to no benefit."""
        self._llm.shutdown(timeout=0)

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[float]:
        """Pause computation and keep requests in flight. Yields the start of the pause on the monotonic clock.

        The engine stays paused if an update is incomplete.
        """
        async with self._pausing:
            since = time.monotonic()
            try:
                await self._llm.pause_generation(mode="keep")
                yield since
            finally:
                if not self._incomplete:
                    await self._llm.resume_generation()

    @asynccontextmanager
    async def _or_aborted(self, names: Sequence[str]) -> AsyncIterator[None]:
        """Abort the requests with these names if the body raises."""
        try:
            yield
        except BaseException:
            await self._llm.abort(names)
            raise

    async def _run(self, prompts: Sequence[IntArray], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """Run one batch, after earlier batches if batches are held. Returns outputs in the order of the prompts."""
        async with self._turn if self.settings.hold_batches else nullcontext():
            return await self._together(prompts, params)

    async def _together(self, prompts: Sequence[IntArray], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """Run one batch, held until it is complete if batches are held.

        If it fails, all its requests are aborted. A request left in the engine would be computed together with a later
        batch and change its bits.
        """
        batch = uuid.uuid4().hex
        names = [f"{batch}-{i}" for i in range(len(prompts))]
        sent: list[Output] = []
        async with self._or_aborted(names):
            # The inner abort runs before the engine resumes.
            async with self._paused() if self.settings.hold_batches else nullcontext(), self._or_aborted(names):
                for name, ids, p in zip(names, prompts, params, strict=True):
                    # One ordered pipe leads to the engine, so all requests arrive before a held batch is released.
                    sent.append(await enqueue(self._llm, name, ids.tolist(), p))
            return [await _final(output_of) for output_of in sent]


async def _final(output_of: Output) -> RequestOutput:
    """The single output of a FINAL_ONLY request. Raises RuntimeError if the request is not finished."""
    output = await output_of()
    if not output.finished:
        raise RuntimeError(f"request {output.request_id} returned before it was finished")
    return output


@contextmanager
def _passed_on(error_type: type[Exception], what: str) -> Iterator[None]:
    """Raise errors of vLLM's process, of which vLLM forwards the text only, as exceptions of type `kind`."""
    try:
        yield
    except Exception as error:
        raise error_type(f"{what}: {rpc_error(error)}") from error
