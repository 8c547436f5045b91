"""The DeepSpeed engine around the student: one optimizer step, full weights out, save and load.

The only file that touches DeepSpeed's API. Every rank runs the same calls in the same order; what is a collective says
so.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from actors.types import ScoredRollout
from learner.model import SelfDistillation, load_student
from learner.optimizer import TEACHER, AdamWWithTeacher, learning_rate, teacher_alpha
from learner.packing import assign, group, length, pack
from learner.types import LearnerSettings, StepResult

TAG = "deepspeed"  # sub-folder of a checkpoint


class LearnerEngine:
    """One rank of the learner."""

    def __init__(self, settings: LearnerSettings) -> None:
        self.settings = settings
        self.step = 0
        torch.manual_seed(settings.seed)
        torch.use_deterministic_algorithms(True, warn_only=settings.device == "cuda")
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid: 8 % of a step
        deepspeed.init_distributed(dist_backend="gloo" if settings.device == "cpu" else "nccl")
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        # In float32 the parameters are their own masters; in bf16 DeepSpeed makes the float32 copies from these.
        model = SelfDistillation(load_student(Path(settings.model), self.dtype), settings.loss)
        if settings.config.gradient_checkpointing:
            model.model.gradient_checkpointing_enable()
        optimizer = AdamWWithTeacher(model.parameters(), settings.config.optimizer, teacher_alpha(settings.teacher))
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._deepspeed_config()
        )
        optimizer.rewind_steps()
        self._adam = optimizer
        self.ranks = torch.distributed.get_world_size()
        if settings.config.zero_stage == 3:
            deepspeed.zero.register_external_parameter(self._engine.module, self._engine.module.head.weight)

    def _deepspeed_config(self) -> dict[str, object]:
        bf16 = self.settings.dtype == "bfloat16"
        config: dict[str, object] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # boundaries are set by hand: their number changes from step to step
            "gradient_clipping": self.settings.config.optimizer.grad_clip,
            "zero_optimization": {"stage": self.settings.config.zero_stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**9,
        }
        if bf16:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config

    def train_step(self, samples: Sequence[ScoredRollout]) -> StepResult:
        """One optimizer step on a whole batch, of which this rank computes its share. Collective."""
        s = self.settings
        lengths = [length(sample) for sample in samples]
        shares = assign(lengths, self.ranks)
        packs = [group([lengths[i] for i in share], s.config.micro_batch_tokens) for share in shares]
        mine, my_packs = shares[s.rank], packs[s.rank]
        lr = learning_rate(self.step + 1, s.total_steps, s.config.optimizer)
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = lr
        sums = torch.zeros(4, dtype=torch.float64)
        count = max(len(p) for p in packs)  # the same on every rank: each micro-batch is a collective
        for i in range(count):
            members = [samples[mine[j]] for j in my_packs[i]] if i < len(my_packs) else []
            batch = pack(members, s.loss.skip_first, len(samples), s.loss.top_k).to(self._engine.device)
            self._engine.set_gradient_accumulation_boundary(i == count - 1)
            loss, *rest = self._engine(batch)
            # DeepSpeed averages gradients over ranks; shares of the batch are to be added.
            self._engine.backward(loss * self.ranks, scale_wrt_gas=False)
            self._engine.step()
            sums += torch.stack([loss.detach(), *rest]).double().cpu()
        torch.distributed.all_reduce(sums)
        self.step += 1
        tokens = sum(max(0, len(sample.rollout.completion_ids) - s.loss.skip_first) for sample in samples)
        loss, divergence, mismatch, tail = sums.tolist()
        norm = self._engine.get_global_grad_norm()
        return StepResult(
            loss, divergence, mismatch / max(1, tokens), tail / max(1, tokens), float(norm or 0.0), lr, tokens
        )

    def weights(self, role: str, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, by its Hugging Face name, one at a time. Collective.

        role: "student", or "teacher" for the EMA (which is the student until the first step, and with live weights).
        dtype: None is the engines' dtype, rounded from the float32 masters.
        """
        for name, param in self._engine.module.named_parameters():
            yield name.removeprefix("model."), self._full(param, role).to(dtype or self.dtype)

    def _full(self, param: torch.nn.Parameter, role: str) -> torch.Tensor:
        teacher = role == "teacher" and self.step > 0 and self._adam.alpha is not None
        if self.settings.config.zero_stage == 0:
            return self._adam.state[param][TEACHER] if teacher else param.detach()
        if teacher:
            return safe_get_full_optimizer_state(param, TEACHER)
        return safe_get_full_fp32_param(param)

    def save(self, folder: Path) -> None:
        """Everything a continued run needs: masters, moments, EMA, RNG, step. Collective; `folder` exists."""
        state = {"step": self.step, "rng": torch.get_rng_state()}
        self._engine.save_checkpoint(str(folder), tag=TAG, client_state=state, save_latest=False)

    def load(self, folder: Path) -> None:
        """Continue from `save`. Collective. Raises ValueError if it was saved by another number of ranks."""
        path, state = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint for {self.ranks} learner ranks in it")
        # DeepSpeed links parameters to their optimizer state at the first step, but the teacher is published before it.
        link = getattr(self._optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
        self.step = state["step"]
        torch.set_rng_state(state["rng"])
