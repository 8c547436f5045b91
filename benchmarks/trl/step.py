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

ON_GPU = 8  # sequences of a forward there


class Timed(TrainerCallback):
    """Prints the seconds of each step with the length and loss that the trainer logs."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
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
    parser.add_argument("--device", default="cpu")
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
    """TRL's settings, as close to ours as possible. On a GPU its engine is vLLM, which shares the GPU."""
    on_gpu = a.device == "cuda"
    micro_batch = min(a.batch, ON_GPU) if on_gpu else a.batch
    engine: dict[str, Any] = {"use_cpu": True, "max_prompt_length": 256, "gradient_checkpointing": False}
    if on_gpu:
        engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.25}
        engine |= {"vllm_max_model_length": 2561, "max_prompt_length": 1024, "gradient_checkpointing": True}
    return SDFTConfig(
        output_dir=f"{a.rows}.trl",
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=a.batch // micro_batch,
        max_steps=a.steps,
        learning_rate=1e-5,
        num_generations=1,
        max_completion_length=a.max_new_tokens,
        temperature=1.0,
        logging_steps=1,
        report_to=[],
        bf16=a.dtype == "bfloat16",
        save_strategy="no",
        distillation_mode="topk_logits",
        distillation_topk=a.top_k,
        distillation_add_tail=True,
        distillation_alpha=0.0,  # forward: KL(teacher || student)
        distillation_is_clip=2.0,
        num_loss_tokens_to_skip=a.skip,
        teacher_model_kind="ema",
        teacher_update_rate=0.01,
        **engine,
    )


def main() -> None:
    trainer = make_trainer(arguments())
    trainer.add_callback(Timed())
    trainer.train()


if __name__ == "__main__":
    main()
