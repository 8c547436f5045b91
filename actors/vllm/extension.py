"""The extension that vLLM loads into its worker processes."""

import sdft.actors.vllm.transfer  # noqa: F401  registers the weight transfer in the worker process
from sdft.actors.vllm.compat import (
    chosen_experts,
    hide_rows,
    rotate_each_head,
    router_layers,
    score_from,
    unlink_shared_tensors,
)
from sdft.actors.vllm.experts import kept_name
from sdft.actors.vllm.scoring import first_row, given_ids, temperature

rotate_each_head()
unlink_shared_tensors()


class WorkerExtension:
    """Named in the engine's settings, so that the worker processes import this module."""

    def score_completions_only(self) -> bool:
        """Restrict prompt log-probs to the completion rows that `Engine.score` uses. vLLM computes the prompt's too.

        Returns False for the V2 runner (GPUs), which lacks the patched method. It computes all rows; the values of the
        completion rows are the same.
        """
        return score_from(self.model_runner, first_row, given_ids, temperature)  # type: ignore[attr-defined]

    def keep_experts(self) -> None:
        """Keep the experts of the tokens of named requests (experts.py) until `experts_of` takes them."""
        self._experts = chosen_experts(self.model_runner, kept_name)  # type: ignore[attr-defined]

    def router_layers(self) -> list[int]:
        """The numbers of the layers with routers, in order."""
        return router_layers(self.model_runner)  # type: ignore[attr-defined]

    def experts_of(self, names: list[str]) -> list[list[tuple[int, list[int], bytes]]]:
        """Take what was kept for each name: position of the first token, shape and bytes (int16) of some tokens."""
        return [
            [(begin, list(part.shape), part.numpy().tobytes()) for begin, part in self._experts.pop(name, ())]
            for name in names
        ]

    def hide_rows(self, vocabulary: int) -> None:
        """Leave the tokens from `vocabulary` on out of every distribution (EngineSettings.vocabulary)."""
        hide_rows(self.model_runner, vocabulary)  # type: ignore[attr-defined]
