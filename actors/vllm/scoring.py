"""Scoring with vLLM: log-probs of completion rows only, after a prompt that may come from the cache.

A row has the log-prob of the completion's token itself, then those of the support: the top k, or given tokens and the
top k of the others.
"""

from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from sdft.actors.shared.types import IntArray, TeacherScores
from sdft.actors.vllm.compat import AsyncScheduler, limit_cache

# Extra arguments of a scoring request.
FIRST_ROW = "sdft_first_row"  # the position that predicts the first scored token
GIVEN = "sdft_given"  # the given tokens: bytes of int32 [rows, S], as an array would not survive the way
TEMPERATURE = "sdft_temperature"  # the logits are divided by it
GIVEN_ROWS = "sdft_given_rows"  # 1: the same tokens at every position


def scoring_request(prompt: int, k: int, given: IntArray | None = None, temperature: float = 1.0) -> SamplingParams:
    """A request for the log-probs of the tokens after the first `prompt`, and for k others at each position.

    given: the first of these k, [T, S] or [1, S]. None: the k are the most likely. compat_scoring.py computes both, and
    the temperature.
    """
    extra: dict[str, Any] = {FIRST_ROW: prompt - 1, TEMPERATURE: temperature}
    if given is not None:
        extra |= {GIVEN: np.ascontiguousarray(given, np.int32).tobytes(), GIVEN_ROWS: len(given)}
    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=k,
        extra_args=extra,
        flat_logprobs=True,
        detokenize=False,
        skip_reading_prefix_cache=False,  # by default prompt_logprobs skips it; see SharedPrompts
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def temperature(params: SamplingParams) -> float:
    """What the logits of a scoring request are divided by."""
    return float((params.extra_args or {}).get(TEMPERATURE, 1.0))


def first_row(params: SamplingParams) -> int | None:
    """The position that predicts the first scored token of a request, or None if the request scores nothing."""
    row: int | None = (params.extra_args or {}).get(FIRST_ROW)
    return row


def given_ids(params: SamplingParams) -> torch.Tensor | None:
    """The given tokens of a scoring request, int64 [T, S] or [1, S]; None if it has none."""
    extra = params.extra_args or {}
    if GIVEN not in extra:
        return None
    ids = np.frombuffer(extra[GIVEN], np.int32).reshape(extra[GIVEN_ROWS], -1)
    return torch.from_numpy(ids.astype(np.int64))


def scores_of(output: RequestOutput, tokens: int) -> TeacherScores:
    """The last `tokens` rows of a request's prompt log-probs: [sampled token, the k others] in each row.

    The version is that of the one generated token, which is discarded: the whole prompt is computed in one piece with
    the same weights.
    """
    found = output.prompt_logprobs
    ids, logprobs = found.ids[-tokens:], found.logprobs[-tokens:]
    return TeacherScores(ids[:, 1:].copy(), logprobs[:, 1:].copy(), logprobs[:, 0].copy(), versions_of(output)[0][0])


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
