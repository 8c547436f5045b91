"""The extension that vLLM loads into its worker processes."""

import functools

import sdft.actors.vllm.transfer  # noqa: F401  registers the weight transfer in the worker process
from sdft.actors.vllm.scoring import completion_scores


class WorkerExtension:
    """Named in the engine's settings, so that its worker processes import this file."""

    def score_completions_only(self) -> bool:
        """Compute prompt log-probs of the rows that `Engine.score` asks for; vLLM would compute those of the prompt
        too. False for the V2 runner, on GPUs: it has no such method, and computes all rows, which are the same."""
        runner = self.model_runner  # type: ignore[attr-defined]
        if not hasattr(runner, "_get_prompt_logprobs_dict"):
            return False
        runner._get_prompt_logprobs_dict = functools.partial(completion_scores, runner)
        return True
