"""The student as the learner trains it: a Hugging Face causal LM without padding, its loss inside its forward.

The loss is computed inside the module because ZeRO-3 gathers a parameter only for the modules that own or register it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from learner.config import LossConfig
from learner.loss import divergence_loss
from learner.norm import replace_norms
from learner.packing import MicroBatch

PACKED = "sdft_packed"
SHORT = 256  # tokens; on sequences like these a CPU's fused kernel takes 1.4 times as long, forward and backward
CACHED_SCORES = 1 << 20  # attention scores worked on at once: 4 MB in float32
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
    if query.device.type == "cpu" and max(lengths) <= SHORT:
        return _ShortAttention.apply(query, key, value, lengths, scale).transpose(1, 2), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


class _ShortAttention(torch.autograd.Function):
    """The same for a CPU: matrix products over several sequences at once, each padded to the longest of them.

    The padding comes after every real position, so the causal mask hides it. Only query, key, value and output are kept
    for the gradient; weights are computed again, some sequences at a time so that they stay in the cache.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        out = torch.empty_like(query)
        for group in _Group.all(query, key, lengths):
            q, k, v = (group.padded(x) for x in (query, key, value))
            group.write(out, torch.bmm(group.weights(q, k, scale).to(v.dtype), v))
        ctx.save_for_backward(query, key, value, out)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for group in _Group.all(query, key, ctx.lengths):
            q, k, v, o, g = (group.padded(x) for x in (query, key, value, out, grad))
            weights = group.weights(q, k, ctx.scale)
            group.write(grads[2], torch.bmm(weights.to(g.dtype).transpose(1, 2), g))
            # Softmax backward; the row sum of weights * d weights is that of out * d out (Dao et al. 2022).
            centre = (g.to(weights.dtype) * o).sum(-1, keepdim=True)
            scores = torch.bmm(g, v.transpose(1, 2)).to(weights.dtype).sub_(centre).mul_(weights).mul_(ctx.scale)
            scores = scores.to(q.dtype)
            group.write(grads[0], torch.bmm(scores, k))
            group.write(grads[1], torch.bmm(scores.transpose(1, 2), q))
        return *grads, None, None


@dataclass(frozen=True)
class _Group:
    """Neighbouring sequences of a pack, attended to at once."""

    start: int  # first token
    lengths: tuple[int, ...]
    kv_heads: int

    @classmethod
    def all(cls, query: Tensor, key: Tensor, lengths: tuple[int, ...]) -> "list[_Group]":
        """Groups whose scores fit into a cache."""
        groups, start, members = [], 0, list[int]()
        for length in lengths:
            longest = max([length, *members])
            if members and query.shape[1] * (len(members) + 1) * longest**2 > CACHED_SCORES:
                groups.append(cls(start, tuple(members), key.shape[1]))
                start, members = start + sum(members), []
            members.append(length)
        return [*groups, cls(start, tuple(members), key.shape[1])]

    def padded(self, x: Tensor) -> Tensor:
        """[1, heads, T, D] -> [n * kv heads, heads / kv heads * longest, D]."""
        part = x[0, :, self.start : self.start + sum(self.lengths)].transpose(0, 1)
        rows = pad_sequence(part.split(self.lengths), batch_first=True)  # [n, longest, heads, D]
        return rows.transpose(1, 2).reshape(len(rows) * self.kv_heads, -1, x.shape[-1])

    def weights(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Attention weights, float32 or wider: [n * kv heads, heads / kv heads * longest, longest]."""
        longest = max(self.lengths)
        future = torch.full((longest, longest), -torch.inf, dtype=q.dtype).triu(1).repeat(q.shape[1] // longest, 1)
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scale)
        return torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))

    def write(self, out: Tensor, x: Tensor) -> None:
        """Put [n * kv heads, heads / kv heads * longest, D] into its place in [1, heads, T, D]."""
        rows = x.view(len(self.lengths), out.shape[1], max(self.lengths), out.shape[-1])
        offset = self.start
        for sequence, length in zip(rows, self.lengths, strict=True):
            out[0, :, offset : offset + length] = sequence[:, :length]
            offset += length


AttentionInterface.register(PACKED, packed_attention)


def load_student(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a local folder, dropout off, for packed input. Raises ValueError for heads the loss cannot do."""
    config = AutoConfig.from_pretrained(path)
    used = [name for name in UNSUPPORTED if getattr(config, name, None) not in (None, 1, 1.0)]
    if used:
        raise ValueError(f"{path}: the model's head uses {', '.join(used)}, which the loss does not compute")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=PACKED)
    model.config.use_cache = False
    replace_norms(model)
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
