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
import ctypes
import functools
import mmap
import multiprocessing.context
import multiprocessing.util
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch
import vllm.v1.engine.utils
import xxhash
from vllm import SamplingParams, ir
from vllm.config import WeightTransferConfig
from vllm.config.kernel import IrOpPriorityConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferInitRequest,
    WeightTransferUpdateInfo,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.request import Request

from actors.adapters import merged
from actors.collective import Group, bucket, cut, visit, whole
from actors.config import EngineSettings
from actors.types import (
    BroadcastFailed,
    FloatArray,
    GenerateRequest,
    IntArray,
    Rendezvous,
    Rollout,
    Sampling,
    Snapshot,
    SnapshotDamaged,
    TeacherScores,
    UpdateReport,
    WeightMismatch,
)

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
BACKEND = "sdft"
FUSED = "sdft_cpu"  # our name for kernels of vLLM's
Entry = tuple[str, str, list[int], int, int]  # name, dtype, shape, offset, bytes
FIRST_ROW = "sdft_first_row"  # extra argument of a scoring request: the prompt position that predicts its first token


class Engine:
    """An AsyncLLM that speaks in wire types. All methods need the event loop that `start` ran in."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self._turn = asyncio.Lock()  # one batch at a time: a batch's neighbours must not depend on timing
        self._pausing = asyncio.Lock()  # who pauses the engine is the one to resume it
        self._incomplete = False  # a broadcast broke off: until whole weights are loaded nothing may be computed

    async def start(self) -> None:
        """Load the model, in a process that vLLM starts."""
        s = self.settings
        arguments = AsyncEngineArgs(
            model=s.model,
            dtype=s.dtype,
            enforce_eager=s.enforce_eager,
            ir_op_priority=_fused_norms() if s.enforce_eager and s.device == "cpu" else IrOpPriorityConfig(),
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
        # A process that has used CUDA cannot be forked; the actor's has not, unless the platform did so at import.
        with nullcontext() if torch.cuda.is_initialized() else _forked():
            self._llm = AsyncLLM.from_engine_args(arguments)
        await self._llm.collective_rpc("score_completions_only")
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
        params = [_scoring(len(prompt), k) for prompt, _ in pairs]
        outputs = await self._run([np.concatenate(pair) for pair in pairs], params)
        return [_scores(o, len(c), k) for (_, c), o in zip(pairs, outputs, strict=True)]

    async def probe(self, ids: IntArray) -> FloatArray:
        """Log-prob of every token of `ids` [N] after the first: [N - 1]."""
        # Not in turn: an update is verified at once, also in the middle of a long batch.
        (output,) = await self._together([ids], [_scoring(1, 1)])
        return _scores(output, len(ids) - 1, 1).sampled

    async def update_weights(self, snapshot: Snapshot) -> UpdateReport:
        """Replace the weights and prove it: digest of every tensor before, log-probs of the probe after.

        Requests in flight are kept and go on with the new weights. Raises SnapshotDamaged naming the tensor whose bytes
        are wrong, before anything is touched, or WeightMismatch with the gap of the log-probs.
        """
        # Generation goes on meanwhile.
        await asyncio.to_thread(_check_digests, snapshot)
        async with self._paused() as since:
            await self._load(snapshot, path=snapshot.path)
            self._incomplete = False
        return await self._verified(snapshot, since)

    async def join(self, where: Rendezvous, own_address: str) -> None:
        """Meet the others of a group for broadcasts; the group before is left. own_address: of this machine."""
        place = {"address": where.address, "port": where.port, "rank": where.rank, "size": where.size}
        more = {"own_address": own_address, "timeout_s": where.timeout_s}
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(place | more))

    async def receive_weights(self, snapshot: Snapshot, timeout_s: float) -> UpdateReport:
        """As update_weights, while the learner broadcasts the snapshot to the group that this engine has joined.

        Verified by a sum of each bucket that arrives, and by the probe. BroadcastFailed if it does not arrive whole:
        then nothing is computed any more before update_weights has loaded it.
        """
        async with self._paused() as since:
            self._incomplete = True
            try:
                await self._load(snapshot, within_s=timeout_s)
            except Exception as error:  # vLLM passes on the text of what its process raised, and no type
                raise BroadcastFailed(f"{snapshot.role} weights v{snapshot.version}: {error}") from error
            self._incomplete = False
        return await self._verified(snapshot, since)

    async def _load(self, snapshot: Snapshot, **how: object) -> None:
        entries = [(t.name, t.dtype, list(t.shape), t.offset, t.nbytes) for t in snapshot.tensors]
        await self._llm.start_weight_update()
        update = {"entries": entries, "scale": snapshot.scale} | how
        await self._llm.update_weights(WeightTransferUpdateRequest(update))
        await self._llm.finish_weight_update(weight_version=str(snapshot.version))

    async def _verified(self, snapshot: Snapshot, since: float) -> UpdateReport:
        """Of an update that began then. WeightMismatch if the engine disagrees with the learner."""
        pause_s = time.monotonic() - since
        gap = snapshot.gap(await self.probe(snapshot.probe_ids))
        if not gap <= self.settings.max_probe_gap:  # written so that NaN fails too
            raise WeightMismatch(
                f"{snapshot.role} weights v{snapshot.version}: the engine's log-probs of the probe sequence differ "
                f"from the learner's by {gap:.4f} of their size on average (allowed: {self.settings.max_probe_gap}): "
                f"these are not the weights it was sent"
            )
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
            await self._llm.pause_generation(mode="keep")
            yield since
            if not self._incomplete:
                await self._llm.resume_generation()

    async def _run(self, prompts: Sequence[IntArray], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """Run one batch, when its turn has come if batches are held. Outputs in the order of the prompts."""
        async with self._turn if self.settings.hold else nullcontext():
            return await self._together(prompts, params)

    async def _together(self, prompts: Sequence[IntArray], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """Run one batch, held until it is whole if batches are."""
        batch = uuid.uuid4().hex
        queues = []
        try:
            async with self._paused() if self.settings.hold else nullcontext():
                for i, (ids, p) in enumerate(zip(prompts, params, strict=True)):
                    # In order, over one pipe to the engine: all of them are there before a held batch is released.
                    queues.append(await self._llm.add_request(f"{batch}-{i}", {"prompt_token_ids": ids.tolist()}, p))
            return [await _final(queue) for queue in queues]
        except asyncio.CancelledError:
            for queue in queues:
                await self._llm.abort(queue.request_id, internal=True)
            raise


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
        versions=_versions(output),
        finish_reason=completion.finish_reason or "stop",
    )


def _scoring(prompt: int, k: int) -> SamplingParams:
    """A request for the log-probs of a prompt's tokens after the first `prompt`, and of the top k at each place."""
    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=k,
        extra_args={FIRST_ROW: prompt - 1},
        flat_logprobs=True,
        detokenize=False,
        skip_reading_prefix_cache=False,  # the default of requests like this one; see SharedPrompts
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _scores(output: RequestOutput, tokens: int, k: int) -> TeacherScores:
    """The last `tokens` rows of a request's prompt log-probs: [sampled token, top 1, ..., top k] at each.

    The prompt is computed in one piece, by the weights that then sample the token nobody needs.
    """
    flat = output.prompt_logprobs
    begin = flat.start_indices[-tokens]
    shape = (tokens, k + 1)
    ids = np.asarray(flat.token_ids[begin:], dtype=np.int32).reshape(shape)
    logprobs = np.asarray(flat.logprobs[begin:], dtype=np.float32).reshape(shape)
    version = _versions(output)[0][0]
    return TeacherScores(ids[:, 1:].copy(), logprobs[:, 1:].copy(), logprobs[:, 0].copy(), version)


def _versions(output: RequestOutput) -> tuple[tuple[int, int, int], ...]:
    """(weight version, first token, after the last) of each part of a completion."""
    spans = output.outputs[0].weight_versions
    if not spans:
        raise RuntimeError(f"request {output.request_id} came back without the version of its weights")
    return tuple((int(span.version), span.start, span.end) for span in spans)


@dataclass
class _InitInfo(WeightTransferInitInfo):
    """Of a group for broadcasts; port 0: of none."""

    address: str = ""
    port: int = 0
    rank: int = 0
    size: int = 0
    own_address: str = ""
    timeout_s: float = 0.0


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):
    path: str = ""  # in shared memory; "": by broadcast
    within_s: float = 0.0
    entries: list[Entry] = field(default_factory=list)
    scale: float | None = None  # of adapters


class SnapshotTransfer(WeightTransferEngine[_InitInfo, _UpdateInfo]):
    """Reads snapshots out of shared memory, or receives them, in the engine's worker process."""

    _group: Group | None = None

    init_info_cls = _InitInfo
    update_info_cls = _UpdateInfo

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        if init_info.port:
            self.shutdown()
            i = init_info
            store = visit(i.address, i.port, i.timeout_s)
            self._group = Group(store, i.rank, i.size, self.device, i.own_address, i.timeout_s)
            return
        _die_with_parent()  # a fork does so from its first moment, a spawned one (on GPUs) from here on
        _forget_names()

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        if update_info.path:
            tensors = _tensors(_mapped(update_info.path), update_info.entries)
        else:
            tensors = self._received(update_info.entries, time.monotonic() + update_info.within_s)
        try:
            if update_info.scale is not None:
                base, dtype = Path(self.model_config.model), self.model_config.dtype
                tensors = merged(base, dict(tensors), update_info.scale, dtype)
            self.model.load_weights(tensors)
        except Exception:  # whatever it was, others of a group are not to wait for this engine
            self.shutdown()
            finalize_layerwise_reload(self.model, self.model_config)  # or the next update could not begin
            raise

    def _received(self, entries: Sequence[Entry], deadline: float) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as they come, bucket by bucket. BroadcastFailed if one does not, or is damaged."""
        if self._group is None:
            raise BroadcastFailed("this engine is in no group")
        for part in cut([nbytes for *_, nbytes in entries]):
            here = [entries[i] for i in part]
            start = here[0][3]
            full = bucket(here[-1][3] + here[-1][4] - start, self.device)  # vLLM keeps what is made of it for a while
            self._group.broadcast(full, deadline)
            if not whole(full):
                raise BroadcastFailed(f"{here[0][0]} or one of the {len(here) - 1} tensors after it arrived damaged")
            for name, dtype, shape, offset, nbytes in here:
                yield name, full[offset - start :][:nbytes].view(getattr(torch, dtype)).view(shape)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self.refresh_head()

    def refresh_head(self) -> None:
        """Repack the lm_head. With tied embeddings the CPU backend keeps a repacked copy of it that an update does not
        reach: hidden states are exact then and logits silently stale."""
        head = getattr(self.model, "lm_head", None)
        if head is not None and getattr(head, "quant_method", None) is not None:
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Leave the group. Nothing else is held between updates."""
        if self._group is not None:
            self._group.close()
            self._group = None


class _EngineProcess(multiprocessing.context.ForkProcess):
    """vLLM's process for the engine, as a fork of the actor's."""

    def run(self) -> None:
        _die_with_parent()
        # As vLLM would, but in a fork of a process that Ray has renamed its way of doing so has no effect.
        ray._raylet.setproctitle("VLLM::EngineCore")
        super().run()


class _ForkContext(multiprocessing.context.ForkContext):
    Process = _EngineProcess


@contextmanager
def _forked() -> Iterator[None]:
    """vLLM forks the engines that are made in it: in a Ray actor it would spawn them, to import all of it once more.

    That is as long as all the rest of a start: 25 s instead of 5 on a GPU, with 16 busy cores. The fork has none of the
    actor's threads, and uses nothing of Ray's.
    """
    spawning = vllm.v1.engine.utils.get_mp_context
    vllm.v1.engine.utils.get_mp_context = _ForkContext
    try:
        yield
    finally:
        vllm.v1.engine.utils.get_mp_context = spawning


def _fused_norms() -> IrOpPriorityConfig:
    """Norms by vLLM's own kernels, which its CPU build has and its CPU platform does not choose.

    In place of half a dozen passes over the tensor: rollouts take 0.92 to 0.95 of the time (benchmarks.rollouts).
    Compiled models (enforce_eager: false) fuse them as they are.
    """
    from vllm.kernels import vllm_c

    kernels = {
        "rms_norm": (ir.ops.rms_norm, vllm_c.rms_norm, vllm_c.rms_no_var_size),
        "fused_add_rms_norm": (ir.ops.fused_add_rms_norm, vllm_c.fused_add_rms_norm, vllm_c.rms_add_no_var_size),
    }
    for op, kernel, takes in kernels.values():
        if FUSED not in op.impls:
            op.register_impl(FUSED, supports_args=_contiguous(takes), inplace=kernel.inplace)(kernel.impl_fn)
    return IrOpPriorityConfig(**{name: [FUSED, "native"] for name in kernels})


def _contiguous(takes: Callable[..., bool]) -> Callable[..., bool]:
    """`takes`, and only contiguous tensors: the kernels read row after row whatever the strides say, and of a view, as
    Qwen3's queries and keys are, other numbers."""

    @functools.wraps(takes)
    def supported(*given: Any, **named: Any) -> bool:
        tensors = [x for x in (*given, *named.values()) if isinstance(x, torch.Tensor)]
        return all(x.is_contiguous() for x in tensors) and takes(*given, **named)

    return supported


def _die_with_parent() -> None:
    """This process is killed when the one that started it ends, also when that one is killed."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _forget_names() -> None:
    """Remove what this process has open by a name that nobody needs any more, and that a kill would leave behind."""
    # Semaphores in /dev/shm (the executor has one, tqdm another): what multiprocessing would do at a clean exit.
    for finalizer in list(multiprocessing.util._finalizer_registry.values()):  # type: ignore[attr-defined]
        if finalizer._callback is SemLock._cleanup:  # type: ignore[attr-defined]
            finalizer()
    # The file in which the ranks of an engine met.
    store = torch.distributed.distributed_c10d._get_default_store()
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    if isinstance(store, torch.distributed.FileStore):
        Path(store.path).unlink(missing_ok=True)


def _mapped(path: str) -> memoryview:
    """A snapshot's payload, read-only."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _check_digests(snapshot: Snapshot) -> None:
    payload = _mapped(snapshot.path)
    for t in snapshot.tensors:
        if xxhash.xxh3_128_hexdigest(payload[t.offset : t.offset + t.nbytes]) != t.digest:
            what = f"{snapshot.role} weights v{snapshot.version}: {t.name}"
            raise SnapshotDamaged(f"{what} arrived damaged: its digest is not the learner's")


def _tensors(payload: memoryview, entries: Sequence[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, dtype, shape, offset, _ in entries:
        count = int(np.prod(shape))
        yield name, torch.frombuffer(payload, dtype=getattr(torch, dtype), count=count, offset=offset).view(shape)


WeightTransferEngineFactory.register_engine(BACKEND, SnapshotTransfer)


class SharedPrompts(AsyncScheduler):
    """Of a sequence to be scored only what lies before its first row comes from the cache: what does has no log-probs.

    vLLM would take as much as there is, the beginnings of completions included, or nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        manager = self.kv_cache_manager
        manager.get_computed_blocks = functools.partial(
            _cached_before_scores, manager.get_computed_blocks, self.hash_block_size
        )


def _cached_before_scores(find: Callable[[Request], T], block: int, request: Request) -> T:
    """What `find` finds, had the request no more whole blocks than lie before its row FIRST_ROW."""
    extra = request.sampling_params.extra_args if request.sampling_params else None
    if not extra:
        return find(request)
    hashes = request.block_hashes
    request.block_hashes = hashes[: extra[FIRST_ROW] // block]
    try:
        return find(request)
    finally:
        request.block_hashes = hashes


class WorkerExtension:
    """Named in the engine's settings so that its worker processes import this file and know the transfer above."""

    def score_completions_only(self) -> None:
        """Compute prompt log-probs of the rows that `Engine.score` asks for; vLLM would compute those of the prompt
        too. The V2 runner has no such method and goes on computing all."""
        runner = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "_get_prompt_logprobs_dict"):
            runner._get_prompt_logprobs_dict = functools.partial(_completion_scores, runner)


def _completion_scores(
    runner: Any, hidden_states: torch.Tensor, scheduled: dict[str, int]
) -> dict[str, LogprobsTensors | None]:
    """The runner's `_get_prompt_logprobs_dict` from FIRST_ROW on. Prompts are not cut, but may begin in the cache."""
    scores: dict[str, LogprobsTensors | None] = {}
    for request_id in [r for r in runner.num_prompt_logprobs if r in scheduled]:
        k = runner.num_prompt_logprobs.pop(request_id)
        request = runner.requests[request_id]
        ids, first = request.prompt_token_ids, request.sampling_params.extra_args[FIRST_ROW]
        begin = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
        offset = begin - request.num_computed_tokens
        logits = runner.model.compute_logits(hidden_states[offset + first : offset + len(ids) - 1])
        targets = torch.tensor(ids[first + 1 :], device=logits.device)
        top = runner.sampler.gather_logprobs(runner.sampler.compute_logprobs(logits), k, targets)
        scores[request_id] = LogprobsTensors(*(part.cpu() for part in top[:3]))
    return scores
