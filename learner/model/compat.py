"""What the student model uses of torch and transformers that is not documented. Known for the versions below.

Each function names what it uses. tests/learner/model/test_compat.py has one line for each name and fails without it.
"""

from inspect import signature

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import core_model_loading as loading

TORCH = "2.13.0"
TRANSFORMERS = "5.19.0"
GATED = ("gate_proj", "up_proj", "down_proj")  # a network of these layers treats every token independently


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the scores, of which `weights` is the softmax over the last dimension. Uses _softmax_backward_data.

    The formula (grad - (grad * weights).sum(-1, keepdim=True)) * weights gives other bits.
    """
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype)


def epsilon(module: nn.Module) -> float | None:
    """The epsilon of an RMSNorm of transformers, or None for another module. Uses its variance_epsilon and weight.

    The norms of state spaces and delta nets also take a gate, and are other modules.
    """
    if not hasattr(module, "variance_epsilon") or not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    if len(signature(module.forward).parameters) != 1:
        return None
    return float(module.variance_epsilon)


def last_gated_network(model: PreTrainedModel) -> tuple[nn.Module, nn.Module] | None:
    """The last layer and its feed-forward network, or None if the model has no gated network there.

    Uses base_model.layers, the layer's mlp and the names GATED.
    """
    last = (getattr(model.base_model, "layers", None) or [None])[-1]
    network = getattr(last, "mlp", None)
    if last is None or network is None or not all(hasattr(network, name) for name in GATED):
        return None
    return last, network


def falsely_tied(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Pairs of weights that the configuration ties and that the files hold with different values.

    Uses get_expanded_tied_weights_keys and all_tied_weights_keys.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return [(name, to) for name, to in tied.items() if name not in model.all_tied_weights_keys]


def stored_with(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Return a key for each weight of a model: those with the same key are converted together when they are saved.

    The key of a weight that is only renamed is its name in the files. Uses PreTrainedModel._weight_conversions, and
    WeightTransform.reverse_transform and rename_source_key of transformers.core_model_loading, as its
    revert_weight_conversion does.
    """
    reverse = [conversion.reverse_transform() for conversion in (_conversions(model) or [])[::-1]]
    renamings = [entry for entry in reverse if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, loading.WeightConverter)]
    return [loading.rename_source_key(name, renamings, converters, reverse=True)[0] for name in names]


def as_stored(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights that are converted together, by the names of the modules, as the files have them.

    Uses transformers.core_model_loading.revert_weight_conversion, as PreTrainedModel.save_pretrained does.
    """
    converted: dict[str, Tensor] = loading.revert_weight_conversion(model, weights)
    return converted


def _conversions(model: PreTrainedModel) -> list[loading.WeightTransform] | None:
    conversions: list[loading.WeightTransform] | None = getattr(model, "_weight_conversions", None)
    return conversions
