"""Scores of prompts in vLLM's model runners, by names that are not documented. Known for compat.VLLM.

    V1 (CPUs)  GPUModelRunner._get_prompt_logprobs_dict      ─┐
    V2 (GPUs)  PromptLogprobsWorker.compute_prompt_logprobs  ─┴► rows from a request's first scored one on ─► `scored`

vLLM's own methods compute every row of a prompt at temperature 1. Prompts are not chunked, but their beginning may come
from the cache. tests/actors/vllm/test_compat_scoring.py has one line for each name and fails without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors

from sdft.actors.config import SCORED_AT_ONCE
from sdft.actors.vllm.compat import Rows, begin_of


@dataclass(frozen=True)
class Reading:
    """How the parameters of a request for scores are read."""

    first_row: Rows
    given: Callable[[SamplingParams], torch.Tensor | None]  # tokens [T, S] or [1, S] to score; None: none
    temperature: Callable[[SamplingParams], float]  # what the logits are divided by


def score_by(runner: Any, reading: Reading) -> None:
    """Make a model runner compute a request's scores by `scored`, from its first scored row on.

    Raises RuntimeError for a runner of a kind that is not known.
    """
    if hasattr(runner, "_get_prompt_logprobs_dict"):
        _by_v1(runner, reading)
    elif getattr(runner, "prompt_logprobs_worker", None) is not None:
        _by_v2(runner.prompt_logprobs_worker, reading)
    else:
        raise RuntimeError(f"vLLM's {type(runner).__name__} has no method for log-probs of prompts that is known here")


def _by_v1(runner: Any, reading: Reading) -> None:
    def scores(hidden_states: torch.Tensor, scheduled: dict[str, int]) -> dict[str, LogprobsTensors | None]:
        found: dict[str, LogprobsTensors | None] = {}
        for request_id in [r for r in runner.num_prompt_logprobs if r in scheduled]:
            width = runner.num_prompt_logprobs.pop(request_id)
            request = runner.requests[request_id]
            ids, first = request.prompt_token_ids, reading.first_row(request.sampling_params)
            assert first is not None, "a request for log-probs of a prompt names its first row"
            offset = begin_of(runner, request_id) - request.num_computed_tokens
            logits = runner.model.compute_logits(hidden_states[offset + first : offset + len(ids) - 1])
            targets = torch.tensor(ids[first + 1 :], device=logits.device)
            at = reading.given(request.sampling_params)
            scores_of_it = scored(logits, targets, at, width, reading.temperature(request.sampling_params))
            found[request_id] = LogprobsTensors(*(part.cpu() for part in scores_of_it[:3]))
        return found

    runner._get_prompt_logprobs_dict = scores


def _by_v2(worker: Any, reading: Reading) -> None:
    """Uses add_request, remove_request and compute_prompt_logprobs of the worker, and InputBatch.

    Other requests, as users of a service may make them, keep vLLM's own method.
    """
    add, remove, compute = worker.add_request, worker.remove_request, worker.compute_prompt_logprobs
    waiting: dict[str, SamplingParams] = {}

    def adding(request_id: str, index: int, params: SamplingParams) -> None:
        scores = reading.first_row(params) is not None
        if scores:
            waiting[request_id] = params
        add(request_id, index, SamplingParams() if scores else params)  # also resets what the index had before

    def removing(request_id: str) -> None:
        waiting.pop(request_id, None)
        remove(request_id)

    def computing(
        logits_of: Any, hidden_states: torch.Tensor, batch: Any, all_ids: torch.Tensor, computed: Any, lengths: Any
    ) -> dict[str, LogprobsTensors]:
        found: dict[str, LogprobsTensors] = compute(logits_of, hidden_states, batch, all_ids, computed, lengths)
        for i, request_id in enumerate(batch.req_ids):
            if request_id not in waiting:
                continue
            params, index = waiting.pop(request_id), int(batch.idx_mapping_np[i])
            first, last = reading.first_row(params), int(lengths[index]) - 1
            assert first is not None
            offset = int(batch.query_start_loc_np[i]) - int(batch.num_computed_prefill_tokens_np[i])
            given, heat = reading.given(params), reading.temperature(params)
            parts = []
            for begin in range(first, last, SCORED_AT_ONCE):
                end = min(begin + SCORED_AT_ONCE, last)
                logits = logits_of(hidden_states[offset + begin : offset + end])
                targets = all_ids[index, begin + 1 : end + 1].long()
                at = given if given is None or len(given) == 1 else given[begin - first : end - first]
                parts.append(scored(logits, targets, at, params.prompt_logprobs or 0, heat))
            found[request_id] = LogprobsTensors.cat(parts)
        return found

    worker.add_request, worker.remove_request, worker.compute_prompt_logprobs = adding, removing, computing


def scored(
    logits: torch.Tensor, targets: torch.Tensor, given: torch.Tensor | None, width: int, temperature: float = 1.0
) -> LogprobsTensors:
    """The log-probs of the targets [T], the given tokens [T, S] or [1, S], and the top width - S of the others.

    logits: [T, V]. given: None stands for none of them. Returns ids (int32) and log-probs (float32) [T, 1 + width] on
    the logits' device. The ranks are not used.
    """
    if temperature != 1:
        logits = logits.float() / temperature  # as vLLM does before it samples
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    ids = targets[:, None]
    if given is not None:
        ids = torch.cat([ids, given.to(ids.device).expand(len(targets), -1)], 1)
    values, others = logprobs.gather(1, ids), width + 1 - ids.shape[1]
    if others:
        among = logprobs if given is None else logprobs.scatter(1, ids[:, 1:], -torch.inf)
        top = among.topk(others, dim=1)
        ids, values = torch.cat([ids, top.indices], 1), torch.cat([values, top.values], 1)
    return LogprobsTensors(ids.int(), values, torch.zeros(len(targets), dtype=torch.int32, device=ids.device))
