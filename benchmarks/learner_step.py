"""One learner step on SmolLM2-135M against the floating-point bound of its work, and where the time goes.

    python -m benchmarks.learner_step [--device cuda] [--tokens 4096]

Packed tokens in the dtype of the device: sequences of 96 prompt and 32 completion tokens, every completion token in the
loss. The bound counts 6 operations a token and parameter for the body, 6 for the head on loss tokens only,
and causal attention, at the rate of a large matrix product in that dtype measured in the same run: the best of some, in
a row at the end. What the product reached between the steps tells how busy the machine was with others.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import device_parser, in_a_process, large_product, matrix_rate, report, seconds_in_turn
from benchmarks.operations import Operations
from sdft.actors.shared.process import kept_heap, waiting
from sdft.actors.shared.types import Rollout, SampleId, ScoredRollout, TeacherScores
from sdft.learner.config import LearnerConfig, LossConfig, OptimizerConfig, TeacherConfig
from sdft.learner.loss.chunked import divergence_loss
from sdft.learner.model.student import SelfDistillation, hidden_states, load_student
from sdft.learner.optimizer import AdamWWithTeacher
from sdft.learner.packing import pack
from sdft.learner.types import LearnerSettings, StageSettings
from sdft.learner.worker import LearnerWorker
from sdft.services.config.dtype import native_dtype
from sdft.services.planning.models import resolve_model

PROMPT, COMPLETION, K = 96, 32, 64
PRODUCTS = 12  # in a round: half a second on two cores
LOSS = LossConfig(top_k=K, skip_first=0)
OPTIMIZER = OptimizerConfig(lr=1e-5, warmup_steps=0, schedule="constant")


def samples(sequences: int) -> list[ScoredRollout]:
    """Random tokens and a random teacher: the values do not matter for the time."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(sequences):
        prompt, completion = (rng.integers(100, 40000, n).astype(np.int32) for n in (PROMPT, COMPLETION))
        ids = rng.integers(100, 40000, (COMPLETION, K)).astype(np.int32)
        logprobs = np.full((COMPLETION, K), np.log(0.9 / K), dtype=np.float32)
        rollout = Rollout(prompt, completion, np.full(COMPLETION, -10, np.float32), ((0, 0, COMPLETION),), "length")
        made.append(ScoredRollout(SampleId(0, 0, i, 0), rollout, TeacherScores(ids, logprobs, logprobs[:, 0], 0)))
    return made


def settings(device: str = "cpu", tokens: int = 4096) -> LearnerSettings:
    return LearnerSettings(
        model=str(resolve_model("smollm2-135m", Path.cwd())),
        dtype=native_dtype(device),
        device=device,
        seed=0,
        config=LearnerConfig(micro_batch_tokens=tokens),
        stages=(StageSettings(0, 1000, LOSS, OPTIMIZER),),
        teacher=TeacherConfig(alpha=0.01),
        alone=True,
    )


def launched(run: Callable[[], object]) -> tuple[int, float]:
    """How many kernels a call puts on the GPU, and the seconds that it is at work on them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), sum(e.device_time for e in kernels) / 1e6


def measure(device: str, tokens: int) -> None:
    """Measure and report, in a process whose OpenMP threads wait as a learner's in a run."""
    length = PROMPT + COMPLETION
    sequences = tokens // length
    tokens = sequences * length
    given = settings(device, tokens)
    path, dtype = Path(given.model), getattr(torch, given.dtype)
    learner = LearnerWorker()  # in this process, set up as in a run
    learner.start(given, 1, *learner.rendezvous(), np.arange(100, 132, dtype=np.int32))
    rollouts = samples(sequences)
    batch = pack(rollouts, 0, sequences, K).to(device)
    model = SelfDistillation(load_student(path, dtype), LOSS).to(device)

    def states() -> Tensor:
        return hidden_states(model.model, batch.input_ids, batch.position_ids, batch.lengths, batch.predicting)

    fixed = states().detach().requires_grad_()
    flat = torch.nn.Parameter(torch.randn(sum(p.numel() for p in model.parameters()), device=device))
    flat.grad = torch.randn_like(flat)  # zeros would be one page of the kernel's, read from the cache
    adam = AdamWWithTeacher([flat], 0.01)

    def body() -> None:
        out = states()
        out.backward(torch.ones_like(out))

    def loss() -> None:
        divergence_loss(fixed, model.head.weight, None, batch.targets, LOSS)[0].backward()

    product, operations = large_product(dtype, device)
    seconds = seconds_in_turn(
        {
            "step": lambda: learner.train_step(rollouts),
            "body": body,
            "loss": loss,
            "adamw": adam.step,
            "products": lambda: [product() for _ in range(PRODUCTS)],
        },
        rounds=5,
    )
    rate, between = matrix_rate(dtype, device), PRODUCTS * operations / seconds["products"]
    bound = Operations.of(path).train(tokens, length, sequences * COMPLETION) / rate
    step = seconds["step"]
    rest = step - seconds["body"] - seconds["loss"] - seconds["adamw"]
    parts = {"bound": bound, "whole step": step} | {
        "body, forward and backward": seconds["body"],
        "loss and head": seconds["loss"],
        "AdamW and EMA": seconds["adamw"],
        "rest: DeepSpeed, packing": rest,
    }
    rows = [{"part": name, "s": s, "of the step": s / step, "x bound": s / bound} for name, s in parts.items()]
    rates = f"{rate / 1e9:.0f} GFLOP/s ({between / 1e9:.0f} between steps)"
    what = f"{tokens} packed tokens, {given.dtype} on {device}, {rates}, {tokens / step:.0f} tokens/s"
    report("learner_step", f"Learner step, {what}", rows)
    if device == "cuda":
        kernels, busy = launched(lambda: learner.train_step(rollouts))
        print(f"  a step is {kernels} kernels, on which the GPU is at work for {busy:.3f} s")
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = device_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="in one micro-batch, a multiple of 128")
    arguments = parser.parse_args()
    # As in a strict run. OpenMP reads it when torch is imported, here that has been done, and glibc at a start.
    os.environ.update(waiting(alone=True) | kept_heap(arguments.device))
    in_a_process(partial(measure, arguments.device, arguments.tokens))


if __name__ == "__main__":
    main()
