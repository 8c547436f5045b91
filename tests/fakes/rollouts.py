"""Training sequences for learner tests: random tokens, scored by a real model with another context for the teacher."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdft.actors.shared.drafts import sequence_of
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import Rollout, SampleId, TeacherScores


def make_rollouts(model_path: Path, count: int, k: int, seed: int, skip: int = 0) -> list[TrainingSequence]:
    """Return `count` sequences with completions of 1 to 24 tokens, the first `skip` of which are not in the loss.

    Sampler log-probs are the model's own with small noise, as those of a real sampler. Many tests ask for the same
    rollouts, and some change them.
    """
    return deepcopy(_made(model_path, count, k, seed, skip))


@cache
def _model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@cache
def _made(model_path: Path, count: int, k: int, seed: int, skip: int) -> list[TrainingSequence]:
    model = _model(model_path)
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        prompt = rng.integers(10, 500, rng.integers(5, 30)).astype(np.int32)
        completion = rng.integers(10, 500, 1 if i == 0 else rng.integers(4, 25)).astype(np.int32)
        context = rng.integers(10, 500, 12).astype(np.int32)
        teacher = logprobs(model, np.concatenate([context, prompt]), completion)
        student = logprobs(model, prompt, completion)
        top = teacher.topk(k, -1)
        own = torch.tensor(completion).long()[:, None]
        noise = rng.normal(0, 0.05, len(completion)).astype(np.float32)
        rollout = Rollout(
            prompt, completion, student.gather(1, own)[:, 0].numpy() + noise, ((0, 0, len(completion)),), "length"
        )
        scores = TeacherScores(
            top.indices.numpy().astype(np.int32), top.values.numpy(), teacher.gather(1, own)[:, 0].numpy(), 0
        )
        samples.append(sequence_of(SampleId(0, 0, i, 0), rollout, scores, skip))
    return samples


def logprobs(
    model: torch.nn.Module, prompt: np.ndarray, completion: np.ndarray, vocabulary: int | None = None
) -> torch.Tensor:
    """Return Hugging Face's log-softmax over the first `vocabulary` tokens at every completion position, [T, V]."""
    ids = torch.tensor(np.concatenate([prompt, completion])).long()[None]
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1, :vocabulary], -1)
