"""The extension that vLLM loads into its worker processes."""

from typing import Any

from sdft.actors.shared.sums import damaged
from sdft.actors.transport.ipc import opened
from sdft.actors.vllm.compat import chosen_experts, hide_rows, rotate_each_head, router_layers
from sdft.actors.vllm.compat_processes import unlink_shared_tensors
from sdft.actors.vllm.compat_scoring import Reading, score_by
from sdft.actors.vllm.experts import kept_name
from sdft.actors.vllm.scoring import first_row, given_ids, temperature
from sdft.actors.vllm.transfer import sent  # the import also registers the weight transfer in the worker process

rotate_each_head()
unlink_shared_tensors()


class WorkerExtension:
    """Named in the engine's settings, so that the worker processes import this module."""

    def score_completions_only(self) -> None:
        """Compute the log-probs of the rows that `Engine.score` uses, and no others of a prompt."""
        score_by(self.model_runner, Reading(first_row, given_ids, temperature))  # type: ignore[attr-defined]

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

    def first_damaged(self, handle: list[Any], entries: list[Any]) -> str | None:
        """Return the name of the first tensor in GPU memory that differs from its digest; None: all are right.

        handle, entries: the items of a Handle, and the fields of each TensorEntry. Raises NotReceived if the memory
        cannot be opened.
        """
        return damaged(opened(tuple(handle), self.device), sent(entries))  # type: ignore[attr-defined]

    def hide_rows(self, vocabulary: int) -> None:
        """Leave the tokens from `vocabulary` on out of every distribution (EngineSettings.vocabulary)."""
        hide_rows(self.model_runner, vocabulary)  # type: ignore[attr-defined]
