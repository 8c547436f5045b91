"""The student as the learner trains it: a Hugging Face causal LM without padding, its loss inside its forward.

The loss is computed inside the module because ZeRO-3 gathers a parameter only for the modules that own or register it.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from learner.config import LossConfig
from learner.loss import divergence_loss
from learner.packing import MicroBatch

PACKED = "sdft_packed"
SHORT = 256  # tokens; on sequences like these a CPU's fused kernel takes 1.4 times as long, forward and backward
MOST_PADDING = 1.5  # times the tokens: one long sequence among many short ones would fill the memory with scores
# Settings of a head that is more than a linear layer: the chunked loss would silently leave them out.
UNSUPPORTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: tuple[int, ...] = (),
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence: query [1, heads, T, D], key and value [1, kv heads, T, D].

    Nothing is computed between sequences. Returns [1, T, heads, D].
    """
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ValueError(f"a sequence of {max(lengths)} tokens is longer than the model's window of {sliding_window}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    longest, padded = max(lengths), len(lengths) * max(lengths)
    if query.device.type == "cpu" and longest <= SHORT and padded <= MOST_PADDING * sum(lengths):
        return _short_attention(query, key, value, lengths, scale), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _short_attention(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """The same as two matrix products over all sequences, each padded to the longest: [1, T, heads, D].

    The padding comes after every real position, so the causal mask hides it.
    """
    n, longest, heads, kv = len(lengths), max(lengths), query.shape[1], key.shape[1]

    def padded(x: Tensor) -> Tensor:  # [n, heads, longest, D]
        return pad_sequence(x[0].transpose(0, 1).split(lengths), batch_first=True).transpose(1, 2)

    q = (padded(query) * scale).reshape(n * kv, heads // kv * longest, -1)
    k, v = (padded(x).reshape(n * kv, longest, -1) for x in (key, value))
    future = torch.ones(longest, longest, dtype=torch.bool, device=query.device).triu(1)
    scores = torch.bmm(q, k.transpose(1, 2)).view(n * kv, heads // kv, longest, longest)
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1, dtype=wide).to(query.dtype)
    out = torch.bmm(weights.view(n * kv, -1, longest), v).view(n, heads, longest, -1).transpose(1, 2)
    return torch.cat([sequence[:length] for sequence, length in zip(out, lengths, strict=True)])[None]


AttentionInterface.register(PACKED, packed_attention)


def load_student(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a local folder, dropout off, for packed input. Raises ValueError for heads the loss cannot do."""
    config = AutoConfig.from_pretrained(path)
    used = [name for name in UNSUPPORTED if getattr(config, name, None) not in (None, 1, 1.0)]
    if used:
        raise ValueError(f"{path}: the model's head uses {', '.join(used)}, which the loss does not compute")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=PACKED)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model.train()


class SelfDistillation(nn.Module):
    """Packed micro-batch in, this micro-batch's part of the loss out."""

    def __init__(self, model: PreTrainedModel, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    @property
    def head(self) -> nn.Linear:
        """The linear layer from hidden states to logits."""
        return self.model.get_output_embeddings()

    def forward(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        """loss, divergence, mismatch_kl, tail_mass: the sums of loss.LossSums, as a tuple that DeepSpeed can walk."""
        states = hidden_states(self.model, batch.input_ids, batch.position_ids, batch.lengths)
        return divergence_loss(states[batch.predicting], self.head.weight, self.head.bias, batch.targets, self.loss)


class Probe(nn.Module):
    """Log-probs of one sequence under whatever weights are put in with torch.func.functional_call."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(path)
        with init_empty_weights():  # parameters on the meta device, buffers real: it owns no memory to speak of
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED)
        self.model.tie_weights()  # made empty one by one, tied parameters are no longer the same object
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        """Log-prob of every token of `ids` [N] after the first: [N - 1] float32."""
        states = hidden_states(self.model, ids, torch.arange(len(ids)), (len(ids),))
        logits = self.model.get_output_embeddings()(states[:-1]).float()
        return torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0]


def hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Last hidden states [T, H] of packed sequences: ids [T], positions [T]."""
    inputs = {"input_ids": ids[None], "position_ids": positions[None], "lengths": lengths, "use_cache": False}
    return model.base_model(**inputs).last_hidden_state[0]
