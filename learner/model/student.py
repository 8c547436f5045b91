"""The student as the learner trains it: a Hugging Face causal LM on packed input, with its loss inside its forward.

The loss is computed inside the module because ZeRO-3 gathers a parameter only for the modules that own or register it.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sdft.learner.config import LossConfig
from sdft.learner.loss.chunked import divergence_loss
from sdft.learner.loss.scaling import LogitScaling
from sdft.learner.model.architecture import Untrainable, misfit, read_config, why_not
from sdft.learner.model.compat import falsely_tied
from sdft.learner.model.cpu.last_layer import only_where_read
from sdft.learner.model.cpu.norm import replace_norms
from sdft.learner.model.experts import Replay
from sdft.learner.model.forward import attention_for, hidden_states, packs
from sdft.learner.model.fused import fuse
from sdft.learner.model.mixers import divide
from sdft.learner.packing import MicroBatch


def load_student(path: Path, dtype: torch.dtype, fused: bool = False) -> PreTrainedModel:
    """Load a local folder's model for packed input, without dropout. Raises Untrainable if it cannot be trained.

    fused: use the fused operations on a GPU. They read weights of other modules, which ZeRO stage 3 does not allow.
    """
    if reason := why_not(path):
        raise Untrainable(f"{path} cannot be trained: {reason}")
    try:
        attention = attention_for(read_config(path))
    except Untrainable as error:
        raise Untrainable(f"{path} cannot be trained: {error}") from None
    model, loaded = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported in the loading info instead of raised
    )
    if reason := misfit(loaded):
        raise Untrainable(f"{path} cannot be trained: {reason}")
    for tied, to in falsely_tied(model):
        raise Untrainable(
            f"{path} cannot be trained: its files hold {tied} with other values than {to}, and config.json ties the "
            f"two; set tie_word_embeddings: false there"
        )
    model.config.use_cache = False
    replace_norms(model)
    if packs(model):
        divide(model)
        if fused:
            fuse(model)
        only_where_read(model)
    without_dropout(model)
    return model.train()


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the further names of parameters, such as a tied head's, each with the name in named_parameters."""
    own = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: own[id(p)] for name, p in every if own[id(p)] != name}


def without_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, because rollouts are sampled without dropout.

    Models keep the probability in modules, and again in configurations.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    configurations = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for holder in (*model.modules(), *configurations.values()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(holder, name, 0.0)


class SelfDistillation(nn.Module):
    """Map a packed micro-batch to its part of the loss.

    vocabulary: the number of the head's first rows that are tokens; None: all. replay: of the model's routers, which
    get the experts of the micro-batch.
    """

    def __init__(
        self, model: PreTrainedModel, loss: LossConfig, vocabulary: int | None = None, replay: Replay | None = None
    ) -> None:
        super().__init__()
        self.replay = replay
        self.model = model
        self.loss = loss
        self.scaling = LogitScaling.of(model.config)
        self.vocabulary = vocabulary

    @property
    def head(self) -> nn.Linear:
        """The linear layer from hidden states to logits."""
        return self.model.get_output_embeddings()

    def forward(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Return the sums of divergence_loss, as scalars.

        They are a plain tuple, which DeepSpeed can traverse.
        """
        if self.replay is not None:
            self.replay.chosen = batch.experts
        pack = batch.input_ids, batch.position_ids, batch.lengths, batch.predicting
        states = hidden_states(self.model, *pack, batch.division)
        if batch.division is not None:
            states = batch.division.to_owners(states)
        head = self.head
        return divergence_loss(states, head.weight, head.bias, batch.targets, self.loss, self.scaling, self.vocabulary)


class Probe(nn.Module):
    """Compute the log-probs of one sequence under the weights passed with torch.func.functional_call.

    vocabulary: the number of the head's first rows that are tokens; None: all.
    """

    def __init__(self, path: Path, dtype: torch.dtype, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        config = AutoConfig.from_pretrained(path)
        attention = attention_for(config)
        with init_empty_weights():  # parameters on the meta device, buffers real: almost no memory
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        self.model.tie_weights()  # init_empty_weights replaces parameters one by one, which unties them
        self.eval()

    def parameters_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the module's parameters, for torch.func.functional_call, from weights as the model's files have them.

        They share the memory of the weights, unless transformers converts them. Raises ValueError if one is missing.
        """
        names = {name for name, _ in self.named_parameters()}
        # A folder may also hold a copy of a tied head, which is not a parameter.
        parameters = {f"model.{n}": t for n, t in tensors.items() if f"model.{n}" in names}
        if names - parameters.keys():
            config, dtype = self.model.config, self.model.dtype
            loaded, info = type(self.model).from_pretrained(
                None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
            )
            if missing := sorted(info["missing_keys"]):  # they would be random
                raise ValueError(f"the weights to publish lack {missing[0]}")
            parameters = {f"model.{n}": p.detach() for n, p in loaded.named_parameters()}
        return parameters

    def forward(self, ids: Tensor) -> Tensor:
        """Return the log-prob of every token of `ids` [N] after the first: [N - 1] float32."""
        states = hidden_states(self.model, ids, torch.arange(len(ids), device=ids.device), (len(ids),))
        logits = self.model.get_output_embeddings()(states[:-1])[:, : self.vocabulary]
        logits = LogitScaling.of(self.model.config).apply_(logits).float()
        return torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0]
