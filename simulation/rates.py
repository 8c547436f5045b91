"""The rates of a simulated cluster: of SmolLM2-135M on two cores, or of a file.

room: 64
token_s: 0.003
mean_tokens: 1024
most_tokens: 4096
"""

from dataclasses import dataclass, fields
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Rates:
    """How long engines and learner take. The defaults are from benchmarks.peer."""

    room: int = 16  # sequences that an engine computes concurrently
    token_s: float = 0.05  # seconds per token of a rollout with a full batch
    mean_tokens: int = 64  # of a rollout
    most_tokens: int = 256
    prompt_tokens: int = 60
    teacher_prompt_tokens: int = 200
    score_s: float = 0.28  # to score a teacher prompt with its completion on an otherwise idle engine
    publish_s: float = 0.25  # the learner publishes weights
    load_s: float = 0.4  # an engine loads and verifies them
    start_s: float = 30.0  # an engine starts

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) not in (int, float) or value <= 0 or (field.type is int and type(value) is not int):
                kind = "whole number" if field.type is int else "number"
                raise ValueError(f"{field.name} is {value!r}; set it to a {kind} above 0")

    @classmethod
    def read(cls, path: Path) -> "Rates":
        """Read a YAML file with some of the fields. Raises ValueError with the file, the key and the fix."""
        given, names = yaml.safe_load(path.read_text()), [field.name for field in fields(cls)]
        if not isinstance(given, dict):
            raise ValueError(f"{path} is not a mapping; it may set {', '.join(names)}")
        if unknown := sorted(set(map(str, given)) - set(names)):
            raise ValueError(f"{path}: {unknown[0]} is not a rate; the rates are {', '.join(names)}")
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
