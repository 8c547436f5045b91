"""Sampling with vLLM: completions with the log-prob of each sampled token."""

import numpy as np
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from sdft.actors.shared.types import IntArray, Rollout, Sampling
from sdft.actors.vllm.experts import KEPT
from sdft.actors.vllm.scoring import versions_of


def sampling_request(
    sampling: Sampling, seed: int | None, stop_ids: tuple[int, ...], name: str | None
) -> SamplingParams:
    """A request for one completion. name: under which the experts of its tokens are kept; None: they are not."""
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        stop_token_ids=list(stop_ids),
        logprobs=sampling.likely,  # 0: log-prob of the sampled token only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=None if name is None else {KEPT: name},
    )


def rollout_of(prompt_ids: IntArray, output: RequestOutput, likely: int = 0) -> Rollout:
    """The rollout that a finished request has sampled behind its prompt. likely: as in Sampling."""
    completion = output.outputs[0]
    ids = np.asarray(completion.token_ids, dtype=np.int32)
    # Flat log-probs list the sampled token first at each position, then the most likely ones.
    logprobs = completion.logprobs
    at = np.asarray(logprobs.start_indices)
    return Rollout(
        prompt_ids=prompt_ids,
        completion_ids=ids,
        logprobs=np.asarray(logprobs.logprobs, dtype=np.float32)[at],
        versions=versions_of(output),
        finish_reason=completion.finish_reason or "stop",
        likely=np.asarray(logprobs.token_ids, np.int32)[at[:, None] + 1 + np.arange(likely)] if likely else None,
    )
