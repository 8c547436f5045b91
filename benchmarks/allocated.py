"""Bytes that one micro-batch of the learner allocates on a GPU, counted without one, beside the plan's estimate.

    python -m benchmarks.allocated [--shape 1.5b] [--tokens 8192]

The learner's own forward, loss and backward run on torch's meta device, and every storage that an operation makes is
counted until it is freed. What a kernel allocates inside itself is not seen. The first micro-batch of a step is
counted, before which parameters have no gradients, and a later one.
"""

import argparse
import weakref
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.counted import COMPLETION, LENGTH, K, micro_batch, student
from benchmarks.measure import report
from benchmarks.shapes import SHAPES
from sdft.actors.shared.process import GIB
from sdft.learner.config import Forward as ForwardLoss
from sdft.learner.config import ImportanceConfig, LearnerConfig, LoraConfig, LossConfig
from sdft.learner.loss.chunked import divergence_loss
from sdft.learner.model.cpu.last_layer import only_where_read
from sdft.learner.model.forward import hidden_states
from sdft.learner.model.fused import fuse
from sdft.learner.weights.lora import peft_config
from sdft.services.planning.gpu_memory import Forward, activation_bytes, backward_bytes, forward_bytes
from sdft.services.planning.shape import ModelShape


class Allocating(TorchDispatchMode):
    """Counts the bytes of meta tensors that are made inside the block and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.device.type == "meta":
                self._add(made.untyped_storage(), given)
        return out

    def _add(self, storage: Any, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._alive:  # a view, or written in place
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


@dataclass(frozen=True)
class Case:
    """A micro-batch of sequences of LENGTH tokens."""

    shape: str
    tokens: int
    fused: bool = True  # layers
    checkpointing: bool = False
    later: bool = False  # not the first of its step
    support: int = K  # tokens of the support at a position
    lora: LoraConfig | None = None


@dataclass
class Allocated:
    """Bytes of one micro-batch without its own tensors and the parameters."""

    kept: int  # by the forward of the layers, for backward
    forward: int  # most, up to the end of the loss
    backward: int  # most, in backward


def allocated(case: Case) -> Allocated:
    """Count a micro-batch."""
    model, batch = student(case.shape), micro_batch(case.tokens // LENGTH, case.support)
    if case.fused:
        fuse(model)
    only_where_read(model)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    if case.lora is not None:
        inject_adapter_in_model(peft_config(case.lora, Path(case.shape)), model)
        model.to(torch.bfloat16)
    loss = LossConfig(divergence=ForwardLoss(top_k=min(1024, case.support)), importance=ImportanceConfig(level="token"))
    with Allocating() as counting:
        for _ in range(2 if case.later else 1):
            before, counting.peak = counting.now, counting.now
            states = hidden_states(model, batch.input_ids, batch.position_ids, batch.lengths, batch.predicting)
            kept = counting.now - before
            value = divergence_loss(states, model.get_output_embeddings().weight, None, batch.targets, loss)[0]
            forward, counting.peak = counting.peak, counting.now
            value.backward()
            found = Allocated(kept, forward, counting.peak)
            del states, value
    return found


def model_shape(shape: str, fused: bool, lora: LoraConfig | None = None) -> ModelShape:
    """Return a shape as the plan reads it from a model's folder. lora: of all layers but the head."""
    hidden, intermediate, layers, heads, kv, vocabulary, tied = SHAPES[shape]
    keys, embeddings = kv * hidden // heads, hidden * vocabulary * (1 if tied else 2)
    square, narrow, wide = (hidden, hidden), (hidden, keys), (hidden, intermediate)
    matrices = [] if lora is None else layers * [square, square, narrow, narrow, wide, wide, wide]
    return ModelShape(
        parameters=sum(p.numel() for p in student(shape).parameters()),
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=vocabulary,
        heads=heads,
        adapted=sum(a * b for a, b in matrices),
        adapters=0 if lora is None else lora.rank * sum(map(sum, matrices)),
        queries=hidden,
        keys=keys,
        embeddings=embeddings,
        fused=fused,
    )


def estimated(case: Case) -> Allocated:
    """Return what the plan estimates for a micro-batch."""
    config = LearnerConfig(gradient_checkpointing=case.checkpointing, lora=case.lora)
    shape = model_shape(case.shape, case.fused, case.lora)
    forward = Forward(case.tokens, case.tokens // LENGTH * COMPLETION, case.support, alone=not case.later)
    formulas = (activation_bytes, forward_bytes, backward_bytes)
    return Allocated(*(int(formula(config, "bfloat16", shape, forward)) for formula in formulas))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    rows = []
    for later, fused, checkpointing in product((False, True), repeat=3):
        case = Case(given.shape, given.tokens, fused, checkpointing, later)
        counts, estimates = vars(allocated(case)), vars(estimated(case))
        row: dict[str, object] = {"micro-batch": "later" if later else "first", "layers": "fused" if fused else "plain"}
        row["checkpointing"] = checkpointing
        for part, count in counts.items():
            row |= {f"{part} GiB": count / GIB, f"{part} estimated": estimates[part] / GIB}
        rows.append(row)
    report("allocated", f"{given.shape}, {given.tokens} tokens", rows)


if __name__ == "__main__":
    main()
