"""The undocumented names in learner/model/compat.py: each is in the installed torch and transformers."""

from inspect import Parameter, signature

import pytest
import torch

from sdft.learner.model import compat
from tests.canary import Canary, Library, mentions, named, takes

FILE = "learner/model/compat.py"
TORCH = Library("torch", compat.TORCH, FILE, ("torch",))
TRANSFORMERS = Library("transformers", compat.TRANSFORMERS, FILE, ("transformers",))
MODEL = "transformers.modeling_utils:PreTrainedModel"
LOADING = "transformers.core_model_loading"
LLAMA = "transformers.models.llama.modeling_llama:Llama"


def takes_more(path: str) -> bool:
    """Whether a function takes keyword arguments that it does not name."""
    return any(p.kind is Parameter.VAR_KEYWORD for p in signature(named(path)).parameters.values())


CANARIES: dict[str, Canary] = {
    "RMSNorm.variance_epsilon": lambda: mentions(f"{LLAMA}RMSNorm.__init__", "variance_epsilon", "weight"),
    "base_model.layers": lambda: mentions(f"{LLAMA}Model.__init__", "layers"),
    "a layer's mlp": lambda: mentions(f"{LLAMA}DecoderLayer.__init__", "mlp"),
    "an mlp of gate_proj, up_proj and down_proj": lambda: mentions(f"{LLAMA}MLP.forward", *compat.GATED),
    "a model that passes further arguments of its forward on": lambda: takes_more(f"{LLAMA}Model.forward"),
    "a layer that takes them": lambda: takes_more(f"{LLAMA}DecoderLayer.forward"),
    "PreTrainedModel.get_expanded_tied_weights_keys": lambda: named(f"{MODEL}.get_expanded_tied_weights_keys"),
    "PreTrainedModel.all_tied_weights_keys": lambda: mentions(f"{MODEL}.post_init", "all_tied_weights_keys"),
    "PreTrainedModel._weight_conversions": lambda: mentions(
        f"{LOADING}:revert_weight_conversion", "_weight_conversions"
    ),
    "core_model_loading.revert_weight_conversion(model, state_dict)": lambda: takes(
        f"{LOADING}:revert_weight_conversion", "model", "state_dict"
    ),
    "a revert that goes by reverse_transform and rename_source_key": lambda: mentions(
        f"{LOADING}:revert_weight_conversion", "reverse_transform", "rename_source_key"
    ),
    "WeightTransform.reverse_transform": lambda: named(f"{LOADING}:WeightTransform.reverse_transform"),
    "core_model_loading.rename_source_key(source_key, weight_renamings, weight_converters)": lambda: takes(
        f"{LOADING}:rename_source_key", "source_key", "weight_renamings", "weight_converters"
    ),
    "a model's class of routers by the word Router": lambda: named(
        "transformers.models.mixtral.modeling_mixtral:MixtralTopKRouter"
    ),
}


@pytest.mark.parametrize("library", [TORCH, TRANSFORMERS], ids=lambda library: library.name)
def test_the_installed_version_is_the_known_one(library: Library) -> None:
    library.check_version()


@pytest.mark.parametrize("name", CANARIES)
def test_transformers_has_the_name(name: str) -> None:
    TRANSFORMERS.check(name, CANARIES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_has_the_gradient_of_a_softmax(dtype: torch.dtype) -> None:
    def softmax_backward() -> bool:
        scores, grad = torch.randn(2, 3, 9, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
        weights = torch.softmax(scores.requires_grad_(), -1)
        weights.backward(grad)
        return torch.equal(compat.softmax_backward(grad, weights.detach()), scores.grad)

    TORCH.check("torch._softmax_backward_data(grad_output, output, dim, input_dtype)", softmax_backward)
