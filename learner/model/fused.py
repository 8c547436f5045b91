"""Decoder layers with fewer and larger operations on a GPU, with the values of the plain layers to rounding.

    x ─► norm ─► q, k, v ─► rotary ─► attention ─► o_proj ─┐
    └────────────────────────────────────────────────── add and norm ─► gate, up ─► gated ─► down ─┐
                                                            └──────────────────────────────────── add ─► x

A layer is taken if its code is that of Llama's layer, as in Qwen2, Qwen3, Mistral and others; its attention and its
network if their code is known, too, and as long as they have no adapters. Backward makes the gradients of q, k and v
one matrix, and those of gate and up one: fewer and larger products, and no sums of their results.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from sdft.learner.gpu.operations import fused
from sdft.learner.model.compat import GATED, epsilon

GPU = ("cuda", "meta")
SILU = type(ACT2FN["silu"])
# Attention modules with known code, and where each has its window.
WINDOWS: dict[type[nn.Module], Callable[[nn.Module], int | None]] = {
    llama.LlamaAttention: lambda attention: None,
    mistral.MistralAttention: lambda attention: getattr(attention.config, "sliding_window", None),
    qwen2.Qwen2Attention: lambda attention: attention.sliding_window,
    qwen3.Qwen3Attention: lambda attention: attention.sliding_window,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Normed(torch.autograd.Function):
    """RMSNorm of x [..., H], and x: so that backward adds both gradients of x in one pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, _, scale = fused.add_norm(_rows(x), None, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out.view(x.shape), x

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        return *_norm_gradients(ctx, grad, grad_x), None


class AddNormed(torch.autograd.Function):
    """RMSNorm of x + residual, and that sum: [..., H] each."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, total, scale = fused.add_norm(_rows(x), _rows(residual), weight, eps)
        total = total.view(x.shape)
        ctx.save_for_backward(total, weight, scale)
        return out.view(x.shape), total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        of_sum, of_weight = _norm_gradients(ctx, grad, grad_total)
        return of_sum, of_sum, of_weight, None


def _norm_gradients(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor | None]:
    total, weight, scale = ctx.saved_tensors
    of_x, parts = fused.norm_backward(_rows(grad), _rows(grad_total), _rows(total), weight, scale)
    return of_x.view(total.shape), fused.column_sum(parts, weight.dtype) if weight.requires_grad else None


class Projected(torch.autograd.Function):
    """q, k and v of x [..., H], each [T, heads, D], with q and k rotated by angles [T, D] unless `cos` is None.

    parts: weight [O, H] and bias [O] or None of each projection, in turn.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor | None, sin: Tensor | None, width: int, *parts: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights: list[Any] = list(parts[::2])
        biases = [bias for bias in parts[1::2] if bias is not None]
        ctx.sizes = [len(weight) for weight in weights]
        weight = torch.cat(weights)  # one product forward, and one for the gradient of x
        ctx.save_for_backward(x, cos, sin, weight)
        made = linear(_rows(x), weight, torch.cat(biases) if biases else None)
        q, k, v = (out.unflatten(1, (-1, width)) for out in made.split(ctx.sizes, dim=1))
        return (q, k, v) if cos is None else (*fused.rotary(q, k, cos, sin), v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, weight = ctx.saved_tensors
        if cos is None:
            grad = torch.cat([g.flatten(1) for g in grads], -1)
        else:
            grad = fused.rotary_backward(*(g.contiguous() for g in grads), cos, sin)
        needed, found = ctx.needs_input_grad, [None] * len(ctx.needs_input_grad)
        if needed[0]:
            found[0] = (grad @ weight).view(x.shape)
        if any(needed[4::2]):
            found[4::2] = (grad.T @ _rows(x)).split(ctx.sizes)
        if any(needed[5::2]):
            sums = grad.sum(0).split(ctx.sizes)
            found[5::2] = [part if wanted else None for part, wanted in zip(sums, needed[5::2], strict=True)]
        return tuple(found)


class Rotated(torch.autograd.Function):
    """Rotary embedding of q and k [T, heads, D] by angles [T, D], and v: where a norm stands before the rotation."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return *fused.rotary(q, k, cos, sin), v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        joined = fused.rotary_backward(*(g.contiguous() for g in grads), cos, sin)
        parts = joined.split([g[0].numel() for g in grads], dim=1)
        return *(part.reshape(g.shape) for part, g in zip(parts, grads, strict=True)), None, None


class GatedNetwork(torch.autograd.Function):
    """residual + down(silu(gate(x)) * up(x)) without biases: x, residual [..., H], gate and up [I, H], down [H, I]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows = _rows(x)
        g, u = rows @ gate.T, rows @ up.T
        ctx.save_for_backward(x, gate, up, down, g, u)
        inner = fused.gated(g, u)
        out = inner @ down.T if residual is None else torch.addmm(_rows(residual), inner, down.T)
        return out.view(*x.shape[:-1], len(down))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, g, u = ctx.saved_tensors
        rows, d = _rows(x), _rows(grad)
        inner, both = fused.gated_backward(d @ down, g, u)
        of_x = torch.addmm(both[:, : len(gate)] @ gate, both[:, len(gate) :], up).view(x.shape)
        _, past, *trained = ctx.needs_input_grad
        of_gate, of_up = (both.T @ rows).split(len(gate)) if any(trained[:2]) else (None, None)
        return of_x, grad if past else None, of_gate, of_up, d.T @ inner if trained[2] else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def fuse(model: PreTrainedModel, devices: Collection[str] = GPU) -> int:
    """Make the layers of a model use the fused operations on these devices. Returns how many layers do."""
    count = 0
    for layer in model.modules():
        if not _same(type(layer).forward, llama.LlamaDecoderLayer.forward):
            continue
        first, second = (_epsilon(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        if first is None or second is None:
            continue
        attention = layer.self_attn
        if (window := _window_of(attention)) is not None:
            attention.forward = partial(_attention, attention, attention.forward, window, devices)
        if _same(type(layer.mlp).forward, llama.LlamaMLP.forward) and isinstance(layer.mlp.act_fn, SILU):
            layer.mlp.forward = partial(_network, layer.mlp, layer.mlp.forward, devices)
        layer.forward = partial(_layer, layer, layer.forward, (first, second), devices)
        count += 1
    return count


def _layer(
    layer: nn.Module,
    plain: Callable[..., Tensor],
    eps: tuple[float, float],
    devices: Collection[str],
    hidden_states: Tensor,
    **given: Any,
) -> Tensor:
    if hidden_states.device.type not in devices:
        return plain(hidden_states, **given)
    states, residual = Normed.apply(hidden_states, layer.input_layernorm.weight, eps[0])
    states, _ = layer.self_attn(hidden_states=states, **given)
    states, residual = AddNormed.apply(states, residual, layer.post_attention_layernorm.weight, eps[1])
    network = layer.mlp.forward
    if isinstance(network, partial) and network.func is _network:  # not one that computes only some rows
        return network(states, residual)
    out: Tensor = residual + layer.mlp(states)
    return out


def _attention(
    attention: nn.Module,
    plain: Callable[..., tuple[Tensor, Tensor | None]],
    window: Callable[[nn.Module], int | None],
    devices: Collection[str],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one pack, [1, T, H]."""
    layers: list[Any] = [getattr(attention, name) for name in PROJECTIONS]
    cos, sin = (x.reshape(-1, x.shape[-1]) for x in position_embeddings)
    width = attention.head_dim
    known = len(hidden_states) == 1 and cos.shape[-1] == width and not width & (width - 1) and _plain(layers)
    if hidden_states.device.type not in devices or not known or past_key_values is not None:
        return plain(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **given,
        )
    parts = [part for layer in layers for part in (layer.weight, layer.bias)]
    if hasattr(attention, "q_norm"):
        q, k, v = Projected.apply(hidden_states, None, None, width, *parts)
        q, k, v = Rotated.apply(attention.q_norm(q), attention.k_norm(k), v, cos, sin)
    else:
        q, k, v = Projected.apply(hidden_states, cos, sin, width, *parts)
    attend = AttentionInterface()[attention.config._attn_implementation]
    out, weights = attend(
        attention,
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        attention_mask,
        dropout=0.0,
        scaling=attention.scaling,
        sliding_window=window(attention),
        **given,
    )
    return attention.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def _network(
    network: nn.Module,
    plain: Callable[[Tensor], Tensor],
    devices: Collection[str],
    x: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """Return residual + network(x)."""
    layers: list[Any] = [getattr(network, name) for name in GATED]
    if x.device.type in devices and _plain(layers) and all(layer.bias is None for layer in layers):
        out: Tensor = GatedNetwork.apply(x, residual, *(layer.weight for layer in layers))
        return out
    return plain(x) if residual is None else residual + plain(x)


def _epsilon(norm: nn.Module) -> float | None:
    """The epsilon of a norm with the code of Llama's, or None."""
    return epsilon(norm) if _same(type(norm).forward, llama.LlamaRMSNorm.forward) else None


def _window_of(attention: nn.Module) -> Callable[[nn.Module], int | None] | None:
    """Where an attention module with known code has its window; None for other code.

    The functions that it rotates by are part of its code: ERNIE's and Helium's pair other elements.
    """
    forward = type(attention).forward
    names = forward.__globals__
    for name in ("apply_rotary_pos_emb", "rotate_half"):
        if not _same(names.get(name), getattr(llama, name)):
            return None
    found = (window for known, window in WINDOWS.items() if _same(forward, known.forward))
    return next(found, None)


def _plain(layers: Iterable[nn.Module]) -> bool:
    return all(type(layer) is nn.Linear for layer in layers)


def _same(one: Any, other: Any) -> bool:
    """Whether two functions have the same code, documentation aside."""
    a, b = (getattr(f, "__code__", None) for f in (one, other))
    return a is not None and b is not None and _code(a) == _code(b)


def _code(code: CodeType) -> tuple[Any, ...]:
    """What a function does: its instructions, names and constants. The names of keyword arguments are constants."""
    return code.co_code, code.co_names, [c for c in code.co_consts if not isinstance(c, str)]
