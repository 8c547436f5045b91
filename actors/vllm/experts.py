"""The experts that the routers chose while an engine sampled, so that the learner can route its tokens alike.

V1 runner (CPU):   routers, in each forward ─► kept in the engine's process, by the request's name ─► Rollout.experts
V2 runner (GPUs):  vLLM's enable_return_routed_experts ─► CompletionOutput.routed_experts ─► Rollout.experts
"""

from collections.abc import Sequence

import numpy as np
from vllm import SamplingParams
from vllm.outputs import RequestOutput

from sdft.actors.shared.types import ExpertArray, IntArray

KEPT = "sdft_kept"  # extra argument of a request whose experts are kept: its name

Parts = Sequence[tuple[int, Sequence[int], bytes]]  # first token, shape and bytes of some tokens' experts


def kept_name(params: SamplingParams) -> str | None:
    """The name of a request whose experts are kept, or None for another one."""
    name: str | None = (params.extra_args or {}).get(KEPT)
    return name


def assembled(parts: Parts, tokens: int) -> ExpertArray | None:
    """The experts of a request's tokens, [tokens, routers, k], -1 where they are not known. None: none are known."""
    if not parts:
        return None
    experts = np.full((tokens, *parts[0][1][1:]), -1, np.int16)
    for begin, shape, data in parts:
        experts[begin : begin + shape[0]] = np.frombuffer(data, np.int16).reshape(shape)
    return experts


def returned(output: RequestOutput, layers: Sequence[int], tokens: int) -> ExpertArray:
    """The experts that a finished request of the V2 runner returns: [tokens, routers, k], -1 where they are not known.

    layers: those with routers, in order; vLLM returns all layers. The last token is sampled and never computed.
    Raises RuntimeError if the request returns none.
    """
    found = output.outputs[0].routed_experts
    if found is None:
        raise RuntimeError("vLLM has returned no experts of a request (enable_return_routed_experts)")
    experts = np.full((tokens, len(layers), found.shape[2]), -1, np.int16)
    experts[: len(found)] = found[:, layers]
    return experts


def fill(prompts: Sequence[IntArray], experts: Sequence[ExpertArray | None]) -> None:
    """Fill in, in place, the experts of prompts that were computed once for several requests."""
    first: dict[bytes, ExpertArray] = {}
    for prompt, of_request in zip(prompts, experts, strict=True):
        if of_request is not None:
            known = first.setdefault(prompt.tobytes(), of_request)
            rows = of_request[: len(prompt)]
            missing = rows[:, 0, 0] < 0
            rows[missing] = known[: len(prompt)][missing]
