"""The extension that vLLM loads into its worker processes."""

import functools

import sdft.actors.vllm.transfer  # noqa: F401  registers the weight transfer in the worker process
from sdft.actors.vllm.scoring import completion_scores


class WorkerExtension:
    """Named in the engine's settings, so that its worker processes import this file."""

    def score_completions_only(self) -> None:
        """Compute prompt log-probs of the rows that `Engine.score` asks for; vLLM would compute those of the prompt
        too. The V2 runner has no such method and goes on computing all."""
        runner = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "_get_prompt_logprobs_dict"):
            runner._get_prompt_logprobs_dict = functools.partial(completion_scores, runner)
