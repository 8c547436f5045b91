"""What a model does to the logits of its head: a multiplier, and a soft cap.

    t = cap * tanh(multiplier * z / cap)          z: the head's logits; without a cap, t = multiplier * z

Gemma has a cap, Granite, Cohere and Falcon-H1 have a multiplier.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LogitScaling:
    """Multiplier and soft cap of logits."""

    multiplier: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitScaling":
        """Read the scaling from transformers' configuration of a model."""
        text = config.get_text_config()
        multiplier = 1.0
        for name in ("logit_scale", "lm_head_multiplier"):
            multiplier *= getattr(text, name, None) or 1.0
        return cls(
            multiplier / (getattr(text, "logits_scaling", None) or 1.0), getattr(text, "final_logit_softcapping", None)
        )

    def apply_(self, logits: Tensor) -> Tensor:
        """Scale logits in place, in their dtype, as the models do."""
        if self.multiplier != 1.0:
            logits.mul_(self.multiplier)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def back_(self, gradient: Tensor, scaled: Tensor) -> Tensor:
        """Turn the gradient of scaled logits into that of the head's, in place: times d t / d z at `scaled`."""
        if self.multiplier != 1.0:
            gradient.mul_(self.multiplier)
        if self.cap is not None:
            gradient.mul_(1 - (scaled.to(gradient.dtype) / self.cap).square_())
        return gradient


IDENTITY = LogitScaling()
