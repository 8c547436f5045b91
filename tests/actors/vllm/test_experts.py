"""Rollouts have the experts that the engine chose: those of transformers' routers for the same tokens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM
from vllm.outputs import CompletionOutput, RequestOutput

from sdft.actors.shared.types import GenerateRequest, Sampling
from sdft.actors.vllm.arguments import arguments
from sdft.actors.vllm.experts import assembled, fill, returned
from sdft.actors.worker import EngineWorker
from sdft.learner.model.experts import named_routers
from tests.actors.vllm.test_engine import engine_settings
from tests.models.families import FAMILIES, make_family_model

PROMPT = np.arange(20, 90, dtype=np.int32)  # longer than a block of the engine's cache


@pytest.mark.parametrize("held", [True, False])
def test_rollouts_have_the_experts_of_all_tokens_but_the_last(
    held: bool, ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """The last token is sampled and never computed. The prompt is computed once for both rollouts."""
    folder = make_family_model(FAMILIES["OLMoE"], tmp_path, tiny_model)
    settings = replace(engine_settings(folder), keep_experts=True, hold_batches=held)
    engine = ray.remote(EngineWorker).options(num_cpus=0.5).remote(settings)
    ray.get(engine.start.remote(), timeout=300)
    requests = [GenerateRequest(PROMPT, 1), GenerateRequest(PROMPT, 2), GenerateRequest(PROMPT[:9], 3)]
    rollouts = ray.get(engine.generate.remote(requests, Sampling(12)), timeout=60)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen: list[torch.Tensor] = []
    for _, router in named_routers(model):
        router.register_forward_hook(lambda _, __, out: chosen.append(out[-1]))
    for rollout in rollouts:
        chosen.clear()
        ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.completion_ids])).long()
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False)
        expected = torch.stack(chosen, 1).sort(-1).values.numpy()
        assert rollout.experts.shape == expected.shape
        np.testing.assert_array_equal(np.sort(rollout.experts[:-1], -1), expected[:-1])
        assert (rollout.experts[-1] == -1).all()
    ray.get(engine.stop.remote(), timeout=60)


def test_experts_of_a_shared_prompt_are_those_of_the_request_that_computed_it() -> None:
    whole = np.arange(12, dtype=np.int16).reshape(6, 1, 2)
    first = assembled([(0, (4, 1, 2), whole[:4].tobytes()), (4, (1, 1, 2), whole[4:5].tobytes())], 6)
    second = assembled([(3, (2, 1, 2), (whole[3:5] + 50).tobytes())], 6)
    assert first is not None
    assert second is not None
    fill([np.arange(4)] * 2, [first, second])
    np.testing.assert_array_equal(second[:3], whole[:3])
    np.testing.assert_array_equal(second[3:5], whole[3:5] + 50)
    assert (second[5] == -1).all()
    assert assembled([], 6) is None


def test_experts_that_vllm_returns_are_those_of_the_layers_with_routers() -> None:
    """vLLM's V2 runner returns a row for each computed token, and every layer of the model, in a narrow type."""
    of_layers = np.arange(5 * 4 * 2, dtype=np.uint8).reshape(5, 4, 2)

    def output(experts: np.ndarray | None) -> RequestOutput:
        completion = CompletionOutput(0, "", [7, 8], None, None, routed_experts=experts)
        return RequestOutput("", None, None, None, [completion], finished=True)

    experts = returned(output(of_layers), [1, 3], 6)
    assert experts.dtype == np.int16
    np.testing.assert_array_equal(experts[:5], of_layers[:, [1, 3]])
    assert (experts[5] == -1).all()
    with pytest.raises(RuntimeError, match="no experts of a request"):
        returned(output(None), [1, 3], 6)


def test_vllm_is_asked_for_experts_on_gpus_alone(tmp_path: Path, tiny_model: Path) -> None:
    folder = make_family_model(FAMILIES["OLMoE"], tmp_path, tiny_model)
    settings = replace(engine_settings(folder), keep_experts=True, share_prompts=False)
    on_cpu, on_gpu = arguments(settings), arguments(replace(settings, device="cuda"))
    assert (on_cpu.enable_return_routed_experts, on_cpu.enable_prefix_caching) == (False, False)
    assert (on_gpu.enable_return_routed_experts, on_gpu.enable_prefix_caching) == (True, True)
