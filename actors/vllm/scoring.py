"""Scoring with vLLM: log-probs of completion rows only, after a prompt that may come from the cache."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.request import Request

from sdft.actors.shared.types import TeacherScores

T = TypeVar("T")


FIRST_ROW = "sdft_first_row"  # extra argument of a scoring request: the position that predicts the first scored token


def scoring_request(prompt: int, k: int) -> SamplingParams:
    """A request for the log-probs of the tokens after the first `prompt`, and for the top k at each position."""
    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=k,
        extra_args={FIRST_ROW: prompt - 1},
        flat_logprobs=True,
        detokenize=False,
        skip_reading_prefix_cache=False,  # by default prompt_logprobs skips it; see SharedPrompts
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scores_of(output: RequestOutput, tokens: int, k: int) -> TeacherScores:
    """The last `tokens` rows of a request's prompt log-probs: [sampled token, top 1, ..., top k] in each row.

    The version is that of the one generated token, which is discarded: the whole prompt is computed in one piece with
    the same weights.
    """
    flat = output.prompt_logprobs
    begin = flat.start_indices[-tokens]
    shape = (tokens, k + 1)
    ids = np.asarray(flat.token_ids[begin:], dtype=np.int32).reshape(shape)
    logprobs = np.asarray(flat.logprobs[begin:], dtype=np.float32).reshape(shape)
    version = versions_of(output)[0][0]
    return TeacherScores(ids[:, 1:].copy(), logprobs[:, 1:].copy(), logprobs[:, 0].copy(), version)


def versions_of(output: RequestOutput) -> tuple[tuple[int, int, int], ...]:
    """(weight version, start, end) of each span [start, end) of a completion.

    Raises RuntimeError if the output has no versions.
    """
    spans = output.outputs[0].weight_versions
    if not spans:
        raise RuntimeError(f"request {output.request_id} came back without a weight version")
    return tuple((int(span.version), span.start, span.end) for span in spans)


class SharedPrompts(AsyncScheduler):
    """Scheduler that takes only the part before the first scored row from the cache.

    Cached positions have no log-probs. vLLM itself takes either all that is cached, including beginnings of
    completions, or nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        manager = self.kv_cache_manager
        manager.get_computed_blocks = functools.partial(
            cached_before_scores, manager.get_computed_blocks, self.hash_block_size
        )


def cached_before_scores(find: Callable[[Request], T], block: int, request: Request) -> T:
    """The result of `find` for the request cut to the whole blocks before its row FIRST_ROW."""
    extra = request.sampling_params.extra_args if request.sampling_params else None
    if not extra:
        return find(request)
    hashes = request.block_hashes
    request.block_hashes = hashes[: extra[FIRST_ROW] // block]
    try:
        return find(request)
    finally:
        request.block_hashes = hashes


def completion_scores(
    runner: Any, hidden_states: torch.Tensor, scheduled: dict[str, int]
) -> dict[str, LogprobsTensors | None]:
    """Replacement of the runner's `_get_prompt_logprobs_dict` that computes the rows from FIRST_ROW on.

    Prompts are not chunked, but their beginning may come from the cache.
    """
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
