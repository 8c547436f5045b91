"""Minimum floating-point operations of SDFT for a model of a given shape."""

import json
from dataclasses import dataclass
from pathlib import Path

from sdft.services.planning.shape import ModelShape, read_headers


@dataclass(frozen=True)
class Operations:
    """A forward takes 2 operations per token and parameter, plus attention. Gradients triple that."""

    body: int  # parameters of the layers, without embeddings and head
    head: int  # parameters of the head
    layers: int
    hidden: int

    @classmethod
    def of(cls, model: Path) -> "Operations":
        """The operation counts of a model in a local folder."""
        shape = json.loads((model / "config.json").read_text())
        head = shape["vocab_size"] * shape["hidden_size"]
        embeddings = head if shape["tie_word_embeddings"] else 2 * head
        layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
        parameters = ModelShape.of(model, read_headers(model)).parameters
        return cls(parameters - embeddings, head, layers, hidden)

    def forward(self, tokens: float, length: float, rows: float) -> float:
        """Operations of a forward on `tokens` in sequences of about `length`, with the head on `rows` tokens only.

        Attention is causal.
        """
        attention = 2 * self.layers * self.hidden * length * tokens
        return 2 * self.body * tokens + 2 * self.head * rows + attention

    def train(self, tokens: float, length: float, rows: float) -> float:
        """Operations of a forward and of the gradients of inputs and weights."""
        return 3 * self.forward(tokens, length, rows)
