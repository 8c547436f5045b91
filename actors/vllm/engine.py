"""One vLLM engine: rollouts, teacher scores, verified weight updates. The only file that touches vLLM's API.

    engine = Engine(settings); await engine.start()
    rollouts = await engine.generate(requests, sampling)       # token ids in, token ids and log-probs out
    scores = await engine.score([(teacher_ids, completion_ids)], k)
    report = await engine.update_weights(snapshot)              # raises WeightMismatch if the engine disagrees
    report = await engine.receive_weights(snapshot, seconds)    # the same, by broadcast

With settings.hold a batch is held, enqueued whole, then released: the scheduler then sees the same batch in every run,
so tokens and log-probs are the same bit for bit, however slowly the requests arrive. Without it many calls share the
engine, each with a sequence or a few, and join what is being computed as they come.

With settings.share_prompts a prompt that several sequences begin with is computed once, and kept until the next held
batch or the next weights: a pause empties vLLM's cache.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import WeightTransferConfig
from vllm.config.kernel import IrOpPriorityConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from sdft.actors.config import EngineSettings
from sdft.actors.shared.agreement import Agreement
from sdft.actors.shared.types import (
    BroadcastFailed,
    FloatArray,
    GenerateRequest,
    IntArray,
    Rendezvous,
    Rollout,
    Sampling,
    Snapshot,
    TeacherScores,
    UpdateReport,
)
from sdft.actors.vllm.kernels import fused_norms
from sdft.actors.vllm.process import EngineProcess, error_line, forked
from sdft.actors.vllm.scoring import SharedPrompts, scores_of, scoring_request, versions_of
from sdft.actors.vllm.transfer import BACKEND, check_digests

T = TypeVar("T")
log = logging.getLogger(__name__)
RPC_FAILED = "Call to collective_rpc method failed: "  # what vLLM puts before the text of an error in its process


class Engine:
    """An AsyncLLM that speaks in wire types. All methods need the event loop that `start` ran in."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self._turn = asyncio.Lock()  # one batch at a time: a batch's neighbours must not depend on timing
        self._pausing = asyncio.Lock()  # who pauses the engine is the one to resume it
        self._incomplete = False  # an update broke off: until whole weights are loaded nothing may be computed
        self._agreement = Agreement(settings.max_probe_gap)

    async def start(self) -> None:
        """Load the model, in a process that vLLM starts."""
        s = self.settings
        arguments = AsyncEngineArgs(
            model=s.model,
            load_format="safetensors",  # "auto" would prefer consolidated*.safetensors to the files of the index
            dtype=s.dtype,
            enforce_eager=s.enforce_eager,
            ir_op_priority=fused_norms() if s.enforce_eager and s.device == "cpu" else IrOpPriorityConfig(),
            max_model_len=s.max_model_len,
            # The probe of an update finds a place beside all that is being computed.
            max_num_seqs=s.max_num_seqs if s.hold else s.max_num_seqs + 1,
            # Prompts are not cut in two: CPU generators cannot skip ahead, a cut seeded prompt kills the engine.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(s.max_model_len, 2048),
            # A hit changes the shapes of a prefill and with them the last bits of a log-prob, in each run the same.
            enable_prefix_caching=s.share_prompts,
            scheduler_cls=SharedPrompts if s.share_prompts else None,
            block_size=64 if s.share_prompts and s.device == "cpu" else None,  # only whole blocks are shared
            max_logprobs=s.max_logprobs,
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from, temperature included
            gpu_memory_utilization=s.gpu_memory_utilization,
            kv_cache_memory_bytes=None if s.kv_cache_gib is None else int(s.kv_cache_gib * 2**30),
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            worker_extension_cls=s.extension,
            distributed_executor_backend="uni",
            disable_log_stats=True,
        )
        processes: list[EngineProcess] = []
        try:
            # A process that has used CUDA cannot be forked; the actor's has not, unless the platform did so at import.
            with nullcontext() if torch.cuda.is_initialized() else forked(processes):
                self._llm = AsyncLLM.from_engine_args(arguments)
        except Exception as error:
            # vLLM's own text refers to a log: what its process raised is in the process's `failure`.
            causes = [process.failure for process in processes if process.failure]
            raise RuntimeError(
                f"vLLM cannot start with {s.model}: {causes[0] if causes else error_line(error)}"
            ) from error
        if not all(await self._llm.collective_rpc("score_completions_only")):
            log.warning(
                "teacher scores: vLLM's V2 model runner computes the log-probs of prompts too, not of completions alone"
            )
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest({}))
        await self._llm.update_weight_version("0")

    async def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        """Complete each prompt; rollouts come back in the order of the requests."""
        params = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=request.seed,
                stop_token_ids=list(self.settings.stop_ids),
                logprobs=0,  # the sampled token's only
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for request in requests
        ]
        outputs = await self._run([r.prompt_ids for r in requests], params)
        return [_rollout(r.prompt_ids, o) for r, o in zip(requests, outputs, strict=True)]

    async def score(self, pairs: Sequence[tuple[IntArray, IntArray]], k: int) -> list[TeacherScores]:
        """Score each completion after its (teacher) prompt: top-k log-probs and the completion tokens' own.

        pairs: (prompt ids [P], completion ids [T]); the engine's temperature plays no part.
        """
        params = [scoring_request(len(prompt), k) for prompt, _ in pairs]
        outputs = await self._run([np.concatenate(pair) for pair in pairs], params)
        return [scores_of(o, len(c), k) for (_, c), o in zip(pairs, outputs, strict=True)]

    async def probe(self, ids: IntArray) -> FloatArray:
        """Log-prob of every token of `ids` [N] after the first: [N - 1]."""
        # Not in turn: an update is verified at once, also in the middle of a long batch.
        (output,) = await self._together([ids], [scoring_request(1, 1)])
        return scores_of(output, len(ids) - 1, 1).sampled

    async def update_weights(self, snapshot: Snapshot) -> UpdateReport:
        """Replace the weights and prove it: digest of every tensor before, log-probs of the probe after.

        Requests in flight are kept and go on with the new weights. Raises FileNotFoundError if the snapshot's publisher
        is gone and SnapshotDamaged naming the tensor whose bytes are wrong, both before anything is touched;
        WeightMismatch with the gap of the log-probs; RuntimeError if the weights cannot be loaded: then nothing is
        computed before others are.
        """
        await self._probe_before(snapshot)
        # Held open until it is loaded: if the publisher ends meanwhile the memory stays.
        with open(snapshot.path, "rb") as file:
            # Generation goes on meanwhile.
            await asyncio.to_thread(check_digests, snapshot, file)
            async with self._paused() as since:
                await self._load(snapshot, RuntimeError, path=f"/proc/{os.getpid()}/fd/{file.fileno()}")
        return await self._verified(snapshot, since)

    async def join(self, where: Rendezvous, own_address: str) -> None:
        """Meet the others of a group for broadcasts; the group before is left. own_address: of this machine."""
        place = {"address": where.address, "port": where.port, "rank": where.rank, "size": where.size}
        more = {"own_address": own_address, "timeout_s": where.timeout_s}
        with _passed_on(BroadcastFailed, "the group for broadcasts"):
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(place | more))

    async def receive_weights(self, snapshot: Snapshot, timeout_s: float) -> UpdateReport:
        """As update_weights, while the learner broadcasts the snapshot to the group that this engine has joined.

        Verified by a sum of each bucket that arrives, and by the probe. BroadcastFailed if it does not arrive whole:
        then nothing is computed before update_weights has loaded it.
        """
        await self._probe_before(snapshot)
        async with self._paused() as since:
            await self._load(snapshot, BroadcastFailed, within_s=timeout_s)
        return await self._verified(snapshot, since)

    async def _load(self, snapshot: Snapshot, failure: type[Exception], **how: object) -> None:
        """Within a pause, which is kept if the load fails. failure: what is raised then."""
        entries = [(t.name, t.dtype, list(t.shape), t.offset, t.nbytes) for t in snapshot.tensors]
        self._incomplete = True
        with _passed_on(failure, f"{snapshot.role} weights v{snapshot.version}"):
            await self._llm.start_weight_update()
            update = {"entries": entries, "scale": snapshot.scale} | how
            await self._llm.update_weights(WeightTransferUpdateRequest(update))
            await self._llm.finish_weight_update(weight_version=str(snapshot.version))
        self._incomplete = False

    async def _probe_before(self, snapshot: Snapshot) -> None:
        """Before the first update. WeightMismatch if the engine, as it was loaded, disagrees with the learner."""
        if self._agreement.untried:
            self._agreement.before_first(snapshot, await self.probe(snapshot.probe_ids))

    async def _verified(self, snapshot: Snapshot, since: float) -> UpdateReport:
        """Of an update that began then. WeightMismatch if the engine disagrees with the learner, or with itself."""
        pause_s = time.monotonic() - since
        gap = self._agreement.after(snapshot, await self.probe(snapshot.probe_ids))
        return UpdateReport(snapshot.version, gap, pause_s)

    async def answer(self) -> None:
        """Returns when the engine's process has answered a question: after the step that it computes."""
        await self._llm.is_sleeping()

    @property
    def dead(self) -> bool:
        """Its own process has ended: nothing will be answered any more."""
        return self._llm.errored

    def shutdown(self) -> None:
        """Stop the engine's processes. They are killed: a clean exit is seconds of garbage collection, for nothing."""
        self._llm.shutdown(timeout=0)

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[float]:
        """Nothing is computed within; requests in flight are kept. Yields when that began, on the monotonic clock."""
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
        """Requests of these names that are in the engine are aborted if what is within does not end well."""
        try:
            yield
        except BaseException:
            await self._llm.abort(names)
            raise

    async def _run(self, prompts: Sequence[IntArray], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """Run one batch, when its turn has come if batches are held. Outputs in the order of the prompts."""
        async with self._turn if self.settings.hold else nullcontext():
            return await self._together(prompts, params)

    async def _together(self, prompts: Sequence[IntArray], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """Run one batch, held until it is whole if batches are. If it cannot be run nothing of it stays behind: a later
        batch would be computed with it, which gives other bits."""
        batch = uuid.uuid4().hex
        names = [f"{batch}-{i}" for i in range(len(prompts))]
        queues = []
        async with self._or_aborted(names):
            # The inner abort comes before the engine goes on.
            async with self._paused() if self.settings.hold else nullcontext(), self._or_aborted(names):
                for name, ids, p in zip(names, prompts, params, strict=True):
                    # In order, over one pipe to the engine: all of them are there before a held batch is released.
                    queues.append(await self._llm.add_request(name, {"prompt_token_ids": ids.tolist()}, p))
            return [await _final(queue) for queue in queues]


async def _final(queue: Any) -> RequestOutput:
    """The one output of a FINAL_ONLY request."""
    output = queue.get_nowait() or await queue.get()
    if not output.finished:
        raise RuntimeError(f"request {output.request_id} returned before it was finished")
    return output


def _rollout(prompt_ids: IntArray, output: RequestOutput) -> Rollout:
    completion = output.outputs[0]
    ids = np.asarray(completion.token_ids, dtype=np.int32)
    # Flat log-probs hold the sampled token first at every position; with logprobs=0 there is nothing else.
    logprobs = completion.logprobs
    at = np.asarray(logprobs.start_indices)
    return Rollout(
        prompt_ids=prompt_ids,
        completion_ids=ids,
        logprobs=np.asarray(logprobs.logprobs, dtype=np.float32)[at],
        versions=versions_of(output),
        finish_reason=completion.finish_reason or "stop",
    )


@contextmanager
def _passed_on(kind: type[Exception], what: str) -> Iterator[None]:
    """What vLLM passes on of an error in its process, which is a text, is raised as one of this kind."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {str(error).removeprefix(RPC_FAILED)}") from error
