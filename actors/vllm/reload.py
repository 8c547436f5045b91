"""New weights for a model that serves: in the form and order in which vLLM's loaders put them into place.

    begin ──► load, a few weights at a time ──► finish

Without it a part would keep its old weights: vLLM copies some weights of gpt-oss past the loaders that a reload
replaces, and keeps a second copy of a tied head on a CPU.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sdft.actors.vllm.compat import begin_reload, finish_reload, repack

# gpt-oss: vLLM takes these stacks, [experts, ...], also as one weight for each expert, which goes through the loaders.
STACKS = tuple(f".mlp.experts.{name}" for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"))
SINKS = ".self_attn.sinks"  # gpt-oss: copied into the parameter itself, so not while a reload has replaced it


class Reload:
    """The reload of one model. `begin`, `load` and `finish` follow each other for each version of the weights."""

    def __init__(self, model: torch.nn.Module, config: Any) -> None:
        """config: vLLM's ModelConfig."""
        self._model, self._config = model, config
        self._divided = getattr(config.hf_config, "model_type", None) == "gpt_oss"
        self._last: list[tuple[str, torch.Tensor]] = []

    def begin(self) -> None:
        self._last = []
        begin_reload(self._model)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights under the names of the model's files."""
        self._model.load_weights(self._as_taken(weights) if self._divided else weights)

    def finish(self) -> None:
        """Lay the weights out for the kernels. Also ends a reload that has failed."""
        finish_reload(self._model, self._config)
        if self._last:
            self._model.load_weights(self._last)
        self.refresh_head()

    def refresh_head(self) -> None:
        """Repack the lm_head.

        With tied embeddings the CPU backend keeps a repacked copy of it that an update does not reach. Without a repack
        the hidden states are exact and the logits silently stale.
        """
        head = getattr(self._model, "lm_head", None)
        if head is not None:
            repack(head)

    def _as_taken(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in weights:
            if name.endswith(SINKS):
                self._last.append((name, weight.clone()))  # the snapshot's memory is used again
            elif name.endswith(STACKS):
                layer, _, of_layer = name.rpartition(".")
                yield from ((f"{layer}.{i}.{of_layer}", of_expert) for i, of_expert in enumerate(weight))
            else:
                yield name, weight
