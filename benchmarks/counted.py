"""Kernels and least time of one micro-batch of the learner on a GPU, counted without one, on torch's meta device.

    python -m benchmarks.counted [--shape 1.5b] [--tokens 8192]

The learner's own forward, loss and backward run on tensors without memory, and each operation that a GPU would launch
is counted. The floor of an operation is the larger of its products at the card's rate and its bytes at the card's
bandwidth; the floor of the micro-batch is their sum, as if every kernel ran at full rate without gaps. The bound counts
6 operations per token and parameter, the head on loss tokens only, and causal attention. DeepSpeed and the optimizer
are left out.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.measure import report
from benchmarks.operations import Operations
from benchmarks.shapes import SHAPES, configuration
from sdft.learner.config import Forward, ImportanceConfig, LossConfig
from sdft.learner.loss.chunked import divergence_loss
from sdft.learner.loss.targets import Targets
from sdft.learner.model.attention import PACKED
from sdft.learner.model.compat import epsilon
from sdft.learner.model.cpu.last_layer import only_where_read
from sdft.learner.model.forward import hidden_states
from sdft.learner.model.fused import fuse
from sdft.learner.packing import MicroBatch

PROMPT, COMPLETION, K = 384, 640, 64
LENGTH = PROMPT + COMPLETION
RATE, BYTES_S = 798e12, 3.0e12  # an H100: a large product in bfloat16, copies in its memory
# Operations that launch nothing.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "narrow", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
WRITTEN_ONLY = {"arange", "fill_", "full", "new_zeros", "ones", "zero_", "zeros", "zeros_like"}
PICKED = {"embedding", "gather", "index", "index_select"}  # read as much as they write
PRODUCTS = {"addmm", "bmm", "mm"}


@dataclass
class Part:
    """The operations of a part of the step."""

    kernels: int = 0
    bytes: float = 0.0
    floor_s: float = 0.0


class Counting(TorchDispatchMode):
    """Counts the operations inside the block, by part and by name."""

    def __init__(self, attention_operations: float) -> None:
        """attention_operations: of the forward of one layer's attention."""
        super().__init__()
        self.part = "forward"
        self.parts: defaultdict[str, Part] = defaultdict(Part)
        self.names: Counter[tuple[str, str]] = Counter()
        self._attention = attention_operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and not any(t is g for g in given)]
        if name in VIEWS or not any(t.device.type == "meta" for t in (*given, *made)):
            return out
        written = sum(_bytes(t) for t in made)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                written += _bytes(value)
        moved = written + sum(map(_bytes, given))
        moved = written if name in WRITTEN_ONLY else 2 * written if name in PICKED else moved
        part = self.parts[self.part]
        part.kernels += 1
        part.bytes += moved
        part.floor_s += max(self._operations(name, args) / RATE, moved / BYTES_S)
        self.names[self.part, name] += 1
        return out

    def _operations(self, name: str, args: Sequence[Any]) -> float:
        if "varlen_attn" in name:  # backward computes the scores again
            return self._attention * (2.5 if "backward" in name else 1)
        if name not in PRODUCTS:
            return 0
        left, right = args[1:3] if name == "addmm" else args[:2]
        return 2 * left.numel() * right.shape[-1]


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def student(shape: str) -> PreTrainedModel:
    """Return a model of a shape on the meta device, with norms of one kernel, as on a GPU."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            configuration(shape), dtype=torch.bfloat16, attn_implementation=PACKED
        ).train()
    for module in model.modules():
        if epsilon(module) is not None:  # torch's fused norm, which the meta device takes apart: another of one kernel
            module.forward = partial(_one_kernel, module)
    return model


def _one_kernel(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return layer_norm(x, norm.weight.shape, norm.weight)


def micro_batch(sequences: int, support: int = K) -> MicroBatch:
    """Return a micro-batch of sequences of LENGTH tokens, on the meta device. support: tokens at a position."""
    rows, tokens = sequences * COMPLETION, sequences * LENGTH

    def make(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    real = torch.float32
    targets = Targets(
        sampled_ids=make(rows),
        sampler_logprobs=make(rows, dtype=real),
        teacher_ids=make(rows, support),
        teacher_logprobs=make(rows, support, dtype=real),
        teacher_sampled=make(rows, dtype=real),
        sequence=make(rows),
        completion=make(rows, dtype=real),
        share=make(rows, dtype=real),
    )
    return MicroBatch(make(tokens), make(tokens), (LENGTH,) * sequences, make(rows), targets)


def count(shape: str, tokens: int, fused: bool) -> Counting:
    """Count one micro-batch of the learner. fused: with the fused operations of a layer, as on a GPU."""
    hidden, *_ = SHAPES[shape]
    model, batch = student(shape), micro_batch(tokens // LENGTH)
    if fused:
        fuse(model)
    only_where_read(model)
    # The mean of a sequence's weights reads a number back, which tensors without memory do not have.
    loss = LossConfig(divergence=Forward(top_k=K), importance=ImportanceConfig(level="token"))
    with Counting(2.0 * hidden * LENGTH * tokens) as counting:
        states = hidden_states(model, batch.input_ids, batch.position_ids, batch.lengths, batch.predicting)
        counting.part = "loss"
        value = divergence_loss(states, model.get_output_embeddings().weight, None, batch.targets, loss)[0]
        counting.part = "backward"
        value.backward()
    return counting


def bound_s(shape: str, tokens: int) -> float:
    """Return the least seconds of a micro-batch: its products at the card's rate."""
    hidden, intermediate, layers, heads, kv, vocabulary, _ = SHAPES[shape]
    layer = hidden * (2 * hidden + 2 * kv * hidden // heads) + 3 * hidden * intermediate
    rows = tokens // LENGTH * COMPLETION
    return Operations(layers * layer, hidden * vocabulary, layers, hidden).train(tokens, LENGTH, rows) / RATE


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    bound = bound_s(given.shape, given.tokens)
    rows = []
    for name, fused in (("plain layers", False), ("fused, as on a GPU", True)):
        counting = count(given.shape, given.tokens, fused)
        floor = sum(part.floor_s for part in counting.parts.values())
        rows.append(
            {"layers": name}
            | {f"{part} kernels": found.kernels for part, found in counting.parts.items()}
            | {"kernels": sum(part.kernels for part in counting.parts.values())}
            | {"floor ms": 1000 * floor, "bound ms": 1000 * bound, "floor x bound": floor / bound}
        )
    report("counted", f"{given.shape}, {given.tokens} tokens", rows)


if __name__ == "__main__":
    main()
