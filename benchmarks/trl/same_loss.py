"""Loss of a first step by TRL and by our learner, on the same rollouts, in float32.

benchmarks.peer starts it in the virtual environment of TRL, from the project folder. It prints one line of JSON: name
of the support -> [TRL's loss, our loss].

TRL's support is the student's top K, ours is the teacher's. So the losses are compared on the whole vocabulary and on
the student's top K, which our loss accepts as well. `teacher's top K` is our loss as it is in a run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.compat import distillation_batch
from benchmarks.trl.step import arguments, make_trainer
from sdft.actors.shared.drafts import sequence_of
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import Rollout, SampleId, TeacherScores
from sdft.learner.config import ImportanceConfig, LossConfig
from sdft.learner.model.student import SelfDistillation, load_student
from sdft.learner.packing import pack


def main() -> None:
    a = arguments()
    trainer = make_trainer(a)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # normally set by its training loop
    batch = distillation_batch(trainer, [trainer.train_dataset[i] for i in range(a.batch)])
    pairs = {}
    with torch.no_grad():
        for name, mode in (("whole vocabulary", "full_logits"), ("student's top K", "topk_logits")):
            trainer.args.distillation_mode = mode
            pairs[name] = [trainer.compute_loss(trainer.model, batch).item()]
    pairs["teacher's top K"] = [float("nan")]
    for name, loss in ours(a, batch).items():
        pairs[name].append(loss)
    print(json.dumps(pairs), flush=True)


@torch.no_grad()
def ours(a: argparse.Namespace, batch: dict[str, Any]) -> dict[str, float]:
    """Our loss on a batch of TRL's, with three supports."""
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    samples: dict[str, list[TrainingSequence]] = {}
    for i in range(len(batch["prompt_ids"])):
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        teacher = batch["teacher_input_ids"][i][batch["teacher_attention_mask"][i].bool()]
        p = logprobs(model, torch.cat([prompt, completion]), len(completion))
        q = logprobs(model, teacher, len(completion))  # the sequence ends with the completion
        supports = {
            "whole vocabulary": torch.arange(q.shape[-1]).expand_as(q),
            "student's top K": p.topk(a.top_k).indices,
            "teacher's top K": q.topk(a.top_k).indices,
        }
        own = completion[:, None]
        rollout = Rollout(
            prompt.numpy().astype(np.int32),
            completion.numpy().astype(np.int32),
            p.gather(-1, own)[:, 0].numpy(),
            ((0, 0, len(completion)),),
            "length",
        )
        for name, ids in supports.items():
            scores = TeacherScores(
                ids.numpy().astype(np.int32), q.gather(-1, ids).numpy(), q.gather(-1, own)[:, 0].numpy(), 0
            )
            samples.setdefault(name, []).append(sequence_of(SampleId(0, 0, i, 0), rollout, scores, a.skip))
    student = SelfDistillation(
        load_student(Path(a.model), torch.float32),
        LossConfig(importance=ImportanceConfig(level="off")),
    )
    return {name: student(pack(group, len(group), a.top_k))[0].item() for name, group in samples.items()}


def logprobs(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Log-probs over the vocabulary at the last `tokens` ids: [tokens, V]."""
    return torch.log_softmax(model(ids[None]).logits[0, -tokens - 1 : -1].float(), -1)


if __name__ == "__main__":
    main()
