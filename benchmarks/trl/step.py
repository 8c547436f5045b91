"""Runs steps of TRL's SDFTTrainer and prints a line of JSON for each step.

benchmarks.peer starts it in the virtual environment of TRL.
"""

import argparse
import json
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer


class Timed(TrainerCallback):
    """Prints the seconds of each step with the length and loss that the trainer logs."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            new_tokens = logs["completions/mean_length"]
            print(json.dumps({"seconds": self.seconds, "new_tokens": new_tokens, "loss": logs["loss"]}), flush=True)


def arguments() -> argparse.Namespace:
    """Parse the arguments from benchmarks.peer and set the number of threads."""
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "dtype"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("batch", "steps", "max-new-tokens", "top-k", "skip", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    return a


def make_trainer(a: argparse.Namespace) -> SDFTTrainer:
    """TRL's trainer on our rows, with columns renamed to TRL's names."""
    with open(a.rows) as file:
        rows = [json.loads(line) for line in file]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r["prompt"]}], "privileged_context": r["demonstration"]} for r in rows]
    )
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    return SDFTTrainer(model=a.model, args=configuration(a), train_dataset=data, processing_class=tokenizer)


def configuration(a: argparse.Namespace) -> SDFTConfig:
    """TRL's settings, as close to ours as possible."""
    return SDFTConfig(
        output_dir=f"{a.rows}.trl",
        per_device_train_batch_size=a.batch,
        gradient_accumulation_steps=1,
        max_steps=a.steps,
        learning_rate=1e-5,
        num_generations=1,
        max_completion_length=a.max_new_tokens,
        max_prompt_length=256,
        temperature=1.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=a.dtype == "bfloat16",
        gradient_checkpointing=False,
        save_strategy="no",
        distillation_mode="topk_logits",
        distillation_topk=a.top_k,
        distillation_add_tail=True,
        distillation_alpha=0.0,  # forward: KL(teacher || student)
        distillation_is_clip=2.0,
        num_loss_tokens_to_skip=a.skip,
        teacher_model_kind="ema",
        teacher_update_rate=0.01,
    )


def main() -> None:
    trainer = make_trainer(arguments())
    trainer.add_callback(Timed())
    trainer.train()


if __name__ == "__main__":
    main()
