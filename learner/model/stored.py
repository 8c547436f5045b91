"""Weights under the names and in the layout of the model's files, which engines and exports need.

    modules (transformers)                 files (the checkpoint)
    mlp.experts.gate_up_proj [E, 2I, H]    mlp.experts.0.gate_proj.weight [I, H], ...
    model.layers.0...                      model.language_model.layers.0...

transformers converts a checkpoint when it loads it, and converts back when it saves. Here it converts back a few
weights at a time, those that belong together, so that no copy of the whole model is made.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import Tensor
from transformers import PreTrainedModel

from sdft.learner.model.compat import as_stored, stored_with


class Stored:
    """The layout of a model's files. A model without conversions has the names of its modules."""

    def __init__(self, model: PreTrainedModel) -> None:
        """The model must have been loaded from its files, because transformers notes what it has converted."""
        self._model = model
        persistent = model.state_dict().keys()
        self._constants = [name for name, _ in model.named_buffers() if name in persistent]
        names = [name for name, _ in model.named_parameters()] + self._constants
        self._key = dict(zip(names, stored_with(model, names), strict=True))
        self._together: dict[str, set[str]] = defaultdict(set)
        for name, key in self._key.items():
            self._together[key].add(name)

    def name_of(self, name: str) -> str:
        """The name in the files of a weight that is only renamed there, from its name in the modules."""
        return self._key[name]

    @property
    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers that the files hold beside the parameters, such as the biases of DeepSeek's router."""
        buffers = dict(self._model.named_buffers())
        return ((name, buffers[name]) for name in self._constants)

    def of(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield weights as the files have them, from weights by the names of the modules, in any order."""
        waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, weight in weights:
            key = self._key[name]
            waiting[key][name] = weight
            if waiting[key].keys() == self._together[key]:
                yield from as_stored(self._model, waiting.pop(key)).items()
