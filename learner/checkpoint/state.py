"""The training state on disk: tensors in pieces with their offsets, independent of the ranks and the ZeRO stage.

Each rank writes the pieces that it holds, without communication. A rank that loads assembles each tensor from all files
and takes its own part. (DeepSpeed's universal checkpoints do the same for Adam's two moments only: their converter
would leave out the EMA teacher.)
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sdft.learner.checkpoint.saving import TensorFile

RNG = "rng"
CHANGE = "teacher_change"  # kind of a LoRA teacher's tensors in the training state
FILE_BYTES = 128 << 20


@dataclass(frozen=True)
class Piece:
    """A part of one flattened state tensor."""

    name: str  # kind and parameter: "exp_avg/model.embed_tokens.weight"
    start: int  # offset of the part, in elements
    values: Tensor  # [n]


def state_files(folder: Path, rank: int, step: int, adam_steps: int, pieces: Iterable[Piece]) -> list[TensorFile]:
    """Return one rank's files, of about FILE_BYTES each. adam_steps: the step count of AdamW's bias correction."""
    files: list[TensorFile] = []
    held: list[Piece] = []

    def close() -> None:
        tensors = {piece.name: piece.values for piece in held}
        if not files:
            tensors[RNG] = torch.get_rng_state()
        starts = json.dumps({piece.name: piece.start for piece in held})
        path = folder / f"rank-{rank:05d}-{len(files):05d}.safetensors"
        files.append(TensorFile(path, tensors, {"step": str(step), "adam_steps": str(adam_steps), "starts": starts}))
        held.clear()

    for piece in pieces:
        held.append(piece)
        if sum(p.values.nbytes for p in held) >= FILE_BYTES:
            close()
    if held or not files:
        close()
    return files


class StateFiles:
    """The files of all ranks that wrote a state. Raises ValueError if the folder has none."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("rank-*.safetensors"))
        if not paths:
            raise ValueError(f"{folder} has no learner state (rank-*.safetensors)")
        self._folder = folder
        self._files = [safe_open(path, framework="pt") for path in paths]
        metadata = self._files[0].metadata()
        self.step, self.adam_steps = int(metadata["step"]), int(metadata["adam_steps"])
        self._places: dict[str, list[tuple[int, int]]] = {}  # name -> (file, start)
        for i, file in enumerate(self._files):
            for name, start in json.loads(file.metadata()["starts"]).items():
                self._places.setdefault(name, []).append((i, start))

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._places)

    def whole(self, name: str, numel: int) -> Tensor:
        """Return a tensor of `numel` elements, flat. Raises ValueError unless the pieces cover it exactly."""
        pieces = self.pieces(name)
        ends = [0, *(piece.start + len(piece.values) for piece in pieces)]
        if [piece.start for piece in pieces] == ends[:-1] and ends[-1] == numel:
            return torch.cat([piece.values for piece in pieces])
        raise ValueError(f"{self._folder}: the pieces of {name} do not cover its {numel} elements")

    def pieces(self, name: str) -> list[Piece]:
        """Return the pieces of one tensor, in order."""
        places = sorted(self._places.get(name, ()), key=lambda place: place[1])
        return [Piece(name, start, self._files[i].get_tensor(name)) for i, start in places]

    def rng(self, rank: int) -> Tensor:
        """Return the random state of a rank. A rank that did not write one gets the first rank's."""
        states = [file.get_tensor(RNG) for file in self._files if RNG in file.keys()]  # noqa: SIM118
        return states[rank if rank < len(states) else 0]


def first_difference(before: Path, after: Path) -> str | None:
    """Return the name of the first tensor whose bits differ between two saved states, or None if none does."""
    a, b = StateFiles(before), StateFiles(after)
    if a.names != b.names:
        return sorted(set(a.names) ^ set(b.names))[0]
    for name in a.names:
        pair = [files.pieces(name) for files in (a, b)]
        flat = [torch.cat([piece.values for piece in pieces]) for pieces in pair]
        if not torch.equal(*(x.view(torch.int32) for x in flat)):
            return name
    return None
