"""Scoring with vLLM: log-probs of completion rows only, after a prompt that may come from the cache."""

from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from sdft.actors.shared.types import TeacherScores
from sdft.actors.vllm.compat import AsyncScheduler, limit_cache

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


def first_row(params: SamplingParams) -> int | None:
    """The position that predicts the first scored token of a request, or None if the request scores nothing."""
    row: int | None = (params.extra_args or {}).get(FIRST_ROW)
    return row


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
        limit_cache(self, first_row)
