"""Time of one learner step on SmolLM2-135M against its floating-point bound, and the share of each part.

    python -m benchmarks.learner_step [--device cuda] [--tokens 4096]

The batch is packed sequences of 96 prompt and 32 completion tokens, in the dtype of the device, with every completion
token in the loss. The bound counts 6 operations per token and parameter for the body, 6 for the head on loss tokens
only, and causal attention. It assumes the rate of a large matrix product in the same dtype: the best of several,
measured in a row at the end of the same run. The rate of the product between the steps shows the load of the machine by
other processes.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import device_parser, in_a_process, large_product, matrix_rate, report, seconds_in_turn
from benchmarks.operations import Operations
from sdft.actors.shared.drafts import sequence_of
from sdft.actors.shared.process import kept_heap, openmp_wait_policy
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import Rollout, SampleId, TeacherScores
from sdft.learner.config import Forward, LearnerConfig, LossConfig, OptimizerConfig, TeacherConfig
from sdft.learner.gpu.check import steps_in_one_pass
from sdft.learner.loss.chunked import divergence_loss
from sdft.learner.model.student import SelfDistillation, hidden_states, load_student
from sdft.learner.optimizer import AdamWWithTeacher
from sdft.learner.packing import pack
from sdft.learner.shares import shares
from sdft.learner.types import LearnerSettings, StageSettings
from sdft.learner.worker import LearnerWorker
from sdft.services.config.dtype import native_dtype
from sdft.services.planning.models import resolve_model

PROMPT, COMPLETION, K = 96, 32, 64
PRODUCTS = 12  # per round: half a second on two cores
LOSS = LossConfig(divergence=Forward(top_k=K))
OPTIMIZER = OptimizerConfig(lr=1e-5, warmup_steps=0, schedule="constant")


def samples(sequences: int, prompted: int = PROMPT, answered: int = COMPLETION, k: int = K) -> list[TrainingSequence]:
    """Samples with random tokens and a random teacher. The values do not affect the time.

    prompted, answered: tokens of each prompt and completion.
    """
    rng = np.random.default_rng(0)
    made = []
    for i in range(sequences):
        prompt, completion = (rng.integers(100, 40000, n).astype(np.int32) for n in (prompted, answered))
        ids = rng.integers(100, 40000, (answered, k)).astype(np.int32)
        logprobs = np.full((answered, k), np.log(0.9 / k), dtype=np.float32)
        rollout = Rollout(prompt, completion, np.full(answered, -10, np.float32), ((0, 0, answered),), "length")
        scores = TeacherScores(ids, logprobs, logprobs[:, 0], 0)
        made.append(sequence_of(SampleId(0, 0, i, 0), rollout, scores))
    return made


def settings(
    device: str = "cpu", tokens: int = 4096, model: Path | None = None, loss: LossConfig = LOSS, **config: Any
) -> LearnerSettings:
    """The settings of the only rank. model: a folder; None: SmolLM2-135M. config: of the learner."""
    return LearnerSettings(
        model=str(model or resolve_model("smollm2-135m", Path.cwd())),
        dtype=native_dtype(device),
        device=device,
        seed=0,
        config=LearnerConfig(micro_batch_tokens=tokens, **config),
        stages=(StageSettings(0, 1000, (loss,), OPTIMIZER),),
        teacher=TeacherConfig(alpha=0.01),
        exclusive=True,
    )


def take_step(learner: LearnerWorker, batch: Sequence[TrainingSequence]) -> None:
    """Let a learner of one rank take a step."""
    started = learner._engine.settings
    learner.fetch(shares(batch, 1, started.config.tokens_at_once(started.device))[0])
    learner.train_step()


def launched(run: Callable[[], object]) -> tuple[int, float]:
    """Number of GPU kernels that a call launches, and the seconds that they run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), sum(e.device_time for e in kernels) / 1e6


def measure(device: str, tokens: int) -> None:
    """Measure and report. The OpenMP threads of the process must wait as those of a learner in a run do."""
    length = PROMPT + COMPLETION
    sequences = tokens // length
    tokens = sequences * length
    given = settings(device, tokens)
    path, dtype = Path(given.model), getattr(torch, given.dtype)
    learner = LearnerWorker()  # in this process, with the set-up of a run
    learner.start(given, 1, *learner.rendezvous(), np.arange(100, 132, dtype=np.int32))
    rollouts = samples(sequences)
    batch = pack(rollouts, sequences, K).to(device)
    model = SelfDistillation(load_student(path, dtype), LOSS).to(device)

    def states() -> Tensor:
        return hidden_states(model.model, batch.input_ids, batch.position_ids, batch.lengths, batch.predicting)

    fixed = states().detach().requires_grad_()
    flat = torch.nn.Parameter(torch.randn(sum(p.numel() for p in model.parameters()), device=device))
    flat.grad = torch.randn_like(flat)  # zeros would map to one shared page of the kernel, read from the cache
    adam = AdamWWithTeacher([flat], 0.01, in_one_pass=device == "cuda" and steps_in_one_pass(device))

    def body() -> None:
        out = states()
        out.backward(torch.ones_like(out))

    def loss() -> None:
        divergence_loss(fixed, model.head.weight, None, batch.targets, LOSS)[0].backward()

    product, operations = large_product(dtype, device)
    seconds = seconds_in_turn(
        {
            "step": lambda: take_step(learner, rollouts),
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
    setting = f"{tokens} packed tokens, {given.dtype} on {device}, {rates}, {tokens / step:.0f} tokens/s"
    report("learner_step", f"Learner step, {setting}", rows)
    if device == "cuda":
        kernels, busy = launched(lambda: take_step(learner, rollouts))
        print(f"  a step launches {kernels} kernels, which keep the GPU busy for {busy:.3f} s")
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = device_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in one micro-batch, a multiple of 128")
    arguments = parser.parse_args()
    # The environment of a strict run. It needs a new process: OpenMP reads it at the import of torch, glibc at start.
    os.environ.update(openmp_wait_policy(exclusive=True) | kept_heap(arguments.device))
    in_a_process(partial(measure, arguments.device, arguments.tokens))


if __name__ == "__main__":
    main()
