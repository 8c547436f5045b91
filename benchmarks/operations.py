"""Floating-point operations that the work of SDFT cannot do without, for a model of a given shape."""

import json
from dataclasses import dataclass
from pathlib import Path

from sdft.services.planning.shape import ModelShape


@dataclass(frozen=True)
class Operations:
    """A forward is 2 operations a token and parameter, and attention; with its gradients three times as much."""

    body: int  # parameters of the layers, without embeddings and head
    head: int  # parameters of the head
    layers: int
    hidden: int

    @classmethod
    def of(cls, model: Path) -> "Operations":
        """Of a local model folder."""
        shape = json.loads((model / "config.json").read_text())
        head = shape["vocab_size"] * shape["hidden_size"]
        embeddings = head if shape["tie_word_embeddings"] else 2 * head
        layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
        return cls(ModelShape.of(model).parameters - embeddings, head, layers, hidden)

    def forward(self, tokens: float, length: float, rows: float) -> float:
        """`tokens` in sequences of about `length`, the head on `rows` of them only; attention is causal."""
        attention = 2 * self.layers * self.hidden * length * tokens
        return 2 * self.body * tokens + 2 * self.head * rows + attention

    def train(self, tokens: float, length: float, rows: float) -> float:
        """Forward and both gradients."""
        return 3 * self.forward(tokens, length, rows)
