"""LoRA on a frozen model, and a teacher that is the EMA of the change that the adapters make.

Averaging A and B separately would not average their product. The teacher therefore keeps the change itself,
D <- alpha * scale * B A + (1 - alpha) * D in float32, so that W + D equals the EMA of the full weights. Each rank keeps
some rows of D.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft.actors.shared.adapters import DOWN, UP, adapted
from sdft.actors.shared.model_files import read_header, weight_files
from sdft.learner.checkpoint.state import CHANGE, Piece, StateFiles
from sdft.learner.config import LoraConfig
from sdft.learner.model.architecture import Untrainable
from sdft.learner.model.experts import named_routers
from sdft.learner.model.stored import Stored
from sdft.learner.weights.content import Content

ADAPTER = "default"  # peft's name of a model's only adapter
Whole = Callable[[nn.Parameter], Tensor]  # returns a parameter whole, as the forward uses it; a collective


def peft_config(config: LoraConfig, base: Path) -> PeftConfig:
    return PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets) or "all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )


def _linear(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers that get adapters: all but the head and routers."""
    head = model.get_output_embeddings()
    routers = {id(part) for _, router in named_routers(model) for part in router.modules()}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and id(module) not in routers
    }


class _Unknown(nn.Module):
    """A model whose configuration peft does not see.

    In models with experts peft takes the names of layers beside them for names of experts, which are no layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


class Lora:
    """The adapters of a model, and the student's and teacher's weights that they make."""

    def __init__(
        self, model: PreTrainedModel, config: LoraConfig, base: Path, dtype: torch.dtype, stored: Stored
    ) -> None:
        """Freeze the model and add adapters. A is random, by torch's generator, and B is zero, so no weight changes.

        Call it before the parameters are divided over ranks. Raises ValueError if the head gets an adapter, Untrainable
        if the model's files name an adapted weight differently.
        """
        adapters = peft_config(config, base)
        if not config.targets:
            adapters.target_modules = {f"model.{name}" for name in _linear(model)}
        inject_adapter_in_model(adapters, _Unknown(model))
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        if any(module is model.get_output_embeddings() for module in layers.values()):
            raise ValueError("the model's head cannot have an adapter: the loss reads only the head's own weight")
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {
            f"{name}.weight": (module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight)
            for name, module in layers.items()
        }
        self._stored = {name: stored.name_of(name) for name in self._pairs}
        held = {name for file in weight_files(base) for name in read_header(file)[0]}
        if absent := sorted(set(self._stored.values()) - held):
            raise Untrainable(
                f"{base} cannot be trained with learner.lora: its files have no weight {absent[0]}, and "
                f"adapters are merged by name; save the model again with transformers' save_pretrained"
            )
        self._base = {
            name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if not p.requires_grad
        }
        self._shapes = {name: (up.shape[0], down.shape[1]) for name, (down, up) in self._pairs.items()}
        self.count = sum(p.numel() for p in self._base.values())  # numbers in all weights, adapters merged
        self._dtype = dtype
        self._scale = config.alpha / config.rank
        self._teacher: ChangeEMA | None = None
        self._live = False

    def keep_teacher(self, alpha: float | None, resets: bool, rank: int, ranks: int, device: torch.device) -> None:
        """Begin the teacher's EMA. alpha 0: the teacher is constant, and the base model unless `resets`. alpha None: it
        is the student. device: where the EMA is kept."""
        self._live = alpha is None
        if alpha or (alpha is not None and resets):
            self._teacher = ChangeEMA(self._shapes, alpha * self._scale, 1 - alpha, rank, ranks, device)

    def follow(self, whole: Whole) -> None:
        """Update the teacher after a step. Collective."""
        if self._teacher is not None:
            for name, pair in self._pairs.items():
                self._teacher.follow(name, *map(whole, pair))

    def reset_teacher(self, whole: Whole) -> None:
        """Set the teacher to the student. Collective."""
        if self._teacher is not None:
            for name, pair in self._pairs.items():
                down, up = map(whole, pair)
                self._teacher.become(name, down, up, self._scale)

    def weights(self, role: str, dtype: torch.dtype, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight of a role, adapters merged, in `dtype`. Collective."""
        for name, param in self._base.items():
            weight = whole(param)
            if name in self._pairs and (role == "student" or self._live):
                down, up = map(whole, self._pairs[name])
                yield name, adapted(weight, down, up, self._scale, dtype)
            elif name in self._pairs and self._teacher is not None:
                yield name, (weight.float() + self._teacher.whole(name, weight.device)).to(dtype)
            else:
                yield name, weight.to(dtype)

    def snapshot(self, whole: Whole) -> Content:
        """Return the adapters, which engines merge into the base model."""
        count = sum(p.numel() for pair in self._pairs.values() for p in pair)
        return Content(self._adapters(whole), self._dtype.itemsize * count, self._scale)

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's pieces of the teacher."""
        return iter(()) if self._teacher is None else self._teacher.pieces()

    @property
    def keeps_teacher(self) -> bool:
        """Whether the teacher has a change D: it is neither always the base model nor always the student."""
        return self._teacher is not None

    def load(self, files: StateFiles) -> None:
        """Load the teacher. Raises ValueError if the files do not hold it whole."""
        if self._teacher is not None:
            self._teacher.load(files)

    def _adapters(self, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        for name, (down, up) in self._pairs.items():
            stem = self._stored[name].removesuffix("weight")
            yield stem + DOWN, whole(down)
            yield stem + UP, whole(up)


class ChangeEMA:
    """One rank's rows of the teacher's change D of every weight: [rows, in] float32, 4 bytes per number / ranks.

    They are computed on the adapters' device, wherever they are kept.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        gain: float,
        decay: float,
        rank: int,
        ranks: int,
        device: torch.device,
    ) -> None:
        """shapes: [out, in] of each weight. Every step is D <- gain * B A + decay * D."""
        self._shapes, self._gain, self._decay, self._rank, self._ranks = shapes, gain, decay, rank, ranks
        # Every rank has the same number of rows; those of the last ranks may end in padding.
        pinned = device.type == "cpu" and torch.cuda.is_available()
        self._rows = {
            name: torch.zeros(-(-out // ranks), width, device=device, pin_memory=pinned)
            for name, (out, width) in shapes.items()
        }

    def follow(self, name: str, down: Tensor, up: Tensor) -> None:
        """Update D after a step, unless gain is 0. down is A [rank, in] and up is B [out, rank], both whole."""
        if self._gain:
            self._move(name, down, up, self._gain, self._decay)

    def become(self, name: str, down: Tensor, up: Tensor, scale: float) -> None:
        """Set D <- scale * B A."""
        self._move(name, down, up, scale, 0.0)

    @torch.no_grad()
    def _move(self, name: str, down: Tensor, up: Tensor, gain: float, decay: float) -> None:
        mine = up[self._own_rows(name)].float()
        kept = self._rows[name][: len(mine)]
        rows = kept.to(up.device)
        torch.addmm(rows, mine, down.float(), beta=decay, alpha=gain, out=rows)
        if rows is not kept:
            kept.copy_(rows)

    def whole(self, name: str, device: torch.device) -> Tensor:
        """Return D of a weight whole, [out, in], on a device. Collective."""
        rows, (out, width) = self._rows[name].to(device), self._shapes[name]
        if self._ranks == 1:
            return rows
        parts = rows.new_empty(self._ranks * len(rows), width)
        torch.distributed.all_gather_into_tensor(parts, rows)
        return parts[:out]

    def pieces(self) -> Iterator[Piece]:
        for name, rows in self._rows.items():
            own_rows = self._own_rows(name)
            if own_rows.stop > own_rows.start:
                values = rows[: own_rows.stop - own_rows.start].view(-1)
                yield Piece(f"{CHANGE}/{name}", own_rows.start * rows.shape[1], values)

    def load(self, files: StateFiles) -> None:
        for name, (out, width) in self._shapes.items():
            mine = files.whole(f"{CHANGE}/{name}", out * width).view(out, width)[self._own_rows(name)]
            self._rows[name][: len(mine)].copy_(mine)

    def _own_rows(self, name: str) -> slice:
        """This rank's rows of the whole D."""
        per_rank, out = len(self._rows[name]), self._shapes[name][0]
        return slice(min(out, per_rank * self._rank), min(out, per_rank * (self._rank + 1)))
