"""The extension that vLLM loads into its worker processes."""

import sdft.actors.vllm.transfer  # noqa: F401  registers the weight transfer in the worker process
from sdft.actors.vllm.compat import hide_rows, rotate_each_head, score_from
from sdft.actors.vllm.scoring import first_row

rotate_each_head()


class WorkerExtension:
    """Named in the engine's settings, so that the worker processes import this module."""

    def score_completions_only(self) -> bool:
        """Restrict prompt log-probs to the completion rows that `Engine.score` uses. vLLM computes the prompt's too.

        Returns False for the V2 runner (GPUs), which lacks the patched method. It computes all rows; the values of the
        completion rows are the same.
        """
        return score_from(self.model_runner, first_row)  # type: ignore[attr-defined]

    def hide_rows(self, vocabulary: int) -> None:
        """Leave the tokens from `vocabulary` on out of every distribution (EngineSettings.vocabulary)."""
        hide_rows(self.model_runner, vocabulary)  # type: ignore[attr-defined]
