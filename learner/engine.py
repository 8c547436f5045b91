"""The DeepSpeed engine around the student: one optimizer step, full weights out, save and load.

Only this file and `compat` use DeepSpeed's API. Every rank runs the same calls in the same order. Docstrings mark
collectives.
"""

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
)

from sdft.learner.checkpoint.saving import TensorFile
from sdft.learner.checkpoint.state import CHANGE, Piece, StateFiles, state_files
from sdft.learner.compat import build_nothing, divided_masters, fragment, link_state, numel, reduce_nothing
from sdft.learner.divided import part_of
from sdft.learner.division import groups
from sdft.learner.gpu.check import steps_in_one_pass, usable
from sdft.learner.model.architecture import Untrainable
from sdft.learner.model.experts import Replay, freeze_routers
from sdft.learner.model.faithful import unfaithful
from sdft.learner.model.forward import undivided
from sdft.learner.model.stored import Stored
from sdft.learner.model.student import SelfDistillation, load_student, tied_names
from sdft.learner.offloaded import OffloadedAdamW
from sdft.learner.optimizer import MASTER, TEACHER, AdamWWithTeacher, learning_rate, teacher_alpha
from sdft.learner.packing import pack
from sdft.learner.shares import Share, fetched
from sdft.learner.types import LearnerSettings, StageSettings, StepResult
from sdft.learner.weights.content import Content


class LearnerEngine:
    """One rank of the learner."""

    def __init__(self, settings: LearnerSettings) -> None:
        self.settings = settings
        self.step = 0
        torch.manual_seed(settings.seed)
        torch.use_deterministic_algorithms(settings.config.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs 8 % of a step
        build_nothing(deepspeed)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())  # uses torch's existing group
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self._zero_stage = settings.config.zero_stage_for(settings.dtype)
        fused = settings.device == "cuda" and self._zero_stage < 3 and usable(settings.device, self.dtype)
        # In float32 the parameters are their own masters. In bf16 DeepSpeed makes float32 masters from them.
        student = load_student(Path(settings.model), self.dtype, fused)
        if settings.rank == 0 and (reason := unfaithful(student)):
            raise Untrainable(f"{settings.model} cannot be trained: {reason}")
        if reason := undivided(student, settings.config.sequence_parallel):
            raise Untrainable(f"{settings.model} cannot be trained with learner.sequence_parallel: {reason}")
        self._stored = Stored(student)
        if not settings.config.train_router:
            freeze_routers(student)
        replay = Replay(student) if settings.replay_experts else None
        model = SelfDistillation(student, settings.stages[0].losses[0], settings.vocabulary, replay)
        if settings.config.gradient_checkpointing:
            model.model.gradient_checkpointing_enable()
        self._lora = None
        if settings.config.lora is not None:
            from sdft.learner.weights.lora import Lora  # peft takes seconds to import

            self._lora = Lora(model.model, settings.config.lora, Path(settings.model), self.dtype, self._stored)
        trained = [p for p in model.parameters() if p.requires_grad]
        alpha = teacher_alpha(settings.teacher)
        # At ZeRO stage 0 DeepSpeed returns no gradient norm, and steps on gradients that are not finite too.
        clip = settings.config.optimizer.grad_clip if self._zero_stage == 0 else None
        kind = OffloadedAdamW if settings.config.offload else AdamWWithTeacher
        # At stage 0 the masters are many, and a kernel for each takes longer to launch than the few of torch.
        in_one_pass = settings.device == "cuda" and self._zero_stage > 0 and steps_in_one_pass(settings.device)
        optimizer = kind(trained, None if self._lora else alpha, clip, in_one_pass)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._deepspeed_config()
        )
        self._adam = optimizer
        self._begin()  # the first step would skip it if its gradient is not finite
        optimizer.set_steps(0)  # DeepSpeed's set-up of ZeRO stage 3 takes a step on zero gradients
        self.ranks = torch.distributed.get_world_size()
        self._together = settings.config.sequence_parallel
        self._group = None
        if self._together > 1:
            self._group = groups(self.ranks, self._together)[settings.rank // self._together]
        # At ZeRO stage 0, and at 1 in bfloat16, DeepSpeed adds gradients up by copying all of them into one buffer and
        # back, for a single rank too. At the others the reduction also puts the gradients into the partitions.
        if self.ranks == 1 and self._zero_stage <= (1 if settings.dtype == "bfloat16" else 0):
            reduce_nothing(self._engine)
        if self._lora is not None:
            place = torch.device("cpu") if settings.config.offload else self._engine.device
            self._lora.keep_teacher(alpha, self._resets, settings.rank, self.ranks, place)
        if self._zero_stage == 3:
            for param in self._engine.module.head.parameters():
                deepspeed.zero.register_external_parameter(self._engine.module, param)

    def _deepspeed_config(self) -> dict[str, object]:
        bf16, clip = self.settings.dtype == "bfloat16", self.settings.config.optimizer.grad_clip
        stage = self._zero_stage
        config: dict[str, object] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # boundaries are set by hand: the number of micro-batches varies
            "gradient_clipping": clip if stage > 0 else 0.0,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": self.settings.config.overlap,
                "zero_hpz_partition_size": self.settings.config.zero_group or 1,
            },
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**9,
        }
        if bf16:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            if stage <= 1:  # sums whole gradients once a step: rounded, they would depend on the ranks
                config["communication_data_type"] = "fp32"
        return config

    def _begin(self) -> None:
        """Create the optimizer state of every master."""
        for p in self._masters:
            self._adam.begin(p)
        if self._zero_stage in (1, 2):
            link_state(self._optimizer)

    @property
    def tied(self) -> dict[str, str]:
        """As tied_names of the student."""
        return tied_names(self._engine.module.model)

    @property
    def divided(self) -> bool:
        """Whether each rank holds only a part of each parameter."""
        return self._zero_stage == 3

    @property
    def _resets(self) -> bool:
        """Whether the teacher becomes the student later than at the start of the run."""
        weights = self.settings.teacher.weights
        return weights == "gated" or (weights in ("ema", "frozen") and len(self.settings.stages) > 1)

    @property
    def stage(self) -> StageSettings:
        """The stage of the next step."""
        return self.settings.stages[self.settings.stage_of(self.step + 1)]

    def begin_stage(self) -> None:
        """Reset the teacher to the student and the moments to zero, where configured, before a stage's first step.

        Idempotent. Collective with LoRA.
        """
        if not self.stage.keep_moments:
            self._adam.reset_moments(self._masters)
        if self._resets:
            self.refresh_teacher()

    def refresh_teacher(self) -> None:
        """Set the teacher to the student, between two steps. Collective with LoRA."""
        if self._lora is None:
            self._adam.refresh_teacher(self._masters)
        else:
            self._lora.reset_teacher(self._forward)

    @property
    def _masters(self) -> list[torch.Tensor]:
        """This rank's part of the float32 weights, which the optimizer updates."""
        if self._zero_stage == 3:  # the optimizer holds them only during a step
            return divided_masters(self._optimizer)
        return [p for param_group in self._adam.param_groups for p in param_group["params"]]

    def train_step(self, share: Share) -> StepResult:
        """Take one optimizer step on a whole batch, of which this rank computes its share. Collective."""
        stage, optimizer = self.stage, self.stage.optimizer
        lr = learning_rate(self.step + 1 - stage.before, stage.steps, optimizer)
        for param_group in self._optimizer.param_groups:
            param_group |= {
                "lr": lr,
                "betas": optimizer.betas,
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
            }
        sums = torch.zeros(6, dtype=torch.float64, device=self._engine.device)  # NCCL reduces tensors on GPUs only
        for i in range(share.count):
            members = fetched(share, i) if i < len(share.micro_batches) else []
            self._engine.module.loss = loss = stage.losses[members[0].objective if members else 0]
            batch = pack(members, share.batch_size, loss.divergence.scored.k, max(2, self._together))
            if self._group is not None:
                batch = part_of(batch, self._group, self.settings.rank % self._together, self._together)
            batch = batch.to(self._engine.device)
            self._engine.set_gradient_accumulation_boundary(i == share.count - 1)
            value, *rest = self._engine(batch)
            # DeepSpeed averages gradients over ranks, but the shares of the batch must be summed.
            self._engine.backward(value * self.ranks, scale_wrt_gas=False)
            self._engine.step()
            sums += torch.stack([value.detach(), *rest])
        torch.distributed.all_reduce(sums)
        if self.settings.frees_memory:
            torch.cuda.empty_cache()
        self.step += 1
        norm = self._adam.norm if self._adam.clip is not None else float(self._engine.get_global_grad_norm())
        applied = math.isfinite(norm)  # if not, neither DeepSpeed's optimizers nor AdamWWithTeacher take a step
        if self._lora is not None and applied:
            self._lora.follow(self._forward)
        total, divergence, mismatch, *of_tokens = sums.tolist()
        tokens, sampled = share.loss_tokens, share.student_loss_tokens
        mismatch = mismatch / max(1, sampled) if sampled or not tokens else math.nan
        tail, clipped, entropy = (of_token / max(1, tokens) for of_token in of_tokens)
        return StepResult(
            total,
            divergence,
            mismatch,
            tail,
            norm,
            lr,
            tokens,
            applied,
            clipped=clipped if any(loss.clip is not None for loss in stage.losses) else None,
            loss_entropy=entropy if any(loss.entropy for loss in stage.losses) else None,
        )

    def weights(self, role: str, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every weight whole, as the model's files have it, a few at a time. Collective.

        role: "student", or "teacher" for the EMA, which equals the student until the first step and with live weights.
        dtype: None means the engines' dtype, rounded from the float32 masters.
        """
        wanted = dtype or self.dtype
        if self._lora is not None:
            trained = self._lora.weights(role, wanted, self._forward)
        else:
            trained = (
                (name.removeprefix("model."), self._whole(param, role, wanted).to(wanted))
                for name, param in self._engine.module.named_parameters()
            )
        constants = ((name, buffer.to(wanted)) for name, buffer in self._stored.constants)  # all of them numbers
        return self._stored.of(chain(trained, constants))

    def snapshot(self, role: str) -> Content:
        """Return the weights that a role's engines load: all in their dtype, or only the adapters of a LoRA student."""
        if self._lora is not None and role == "student":
            return self._lora.snapshot(self._forward)
        count = self._lora.count if self._lora is not None else sum(map(numel, self._engine.module.parameters()))
        constants = sum(buffer.numel() for _, buffer in self._stored.constants)
        return Content(self.weights(role), self.dtype.itemsize * (count + constants))

    def _whole(self, param: torch.nn.Parameter, role: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a parameter whole, in float32 or, where it is available without rounding, in the engines' dtype.

        The model's own weights are the rounded masters.
        """
        if not param.requires_grad:
            return self._forward(param)
        stage = self._zero_stage
        if role == "teacher" and self.step > 0 and self._adam.alpha is not None:
            if stage == 0:
                return self._adam.state[param][TEACHER]
            if stage < 3 and self.ranks == 1 and (part := fragment(param, TEACHER)) is not None:
                return part[1].view(param.shape)
            return safe_get_full_optimizer_state(param, TEACHER)
        return self._forward(param) if dtype == self.dtype else safe_get_full_fp32_param(param)

    def _forward(self, param: torch.nn.Parameter) -> torch.Tensor:
        """Return a parameter whole, as the forward uses it. Collective."""
        if self._zero_stage < 3:
            return param.detach()
        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().clone()

    def state(self, folder: Path) -> list[TensorFile]:
        """Return this rank's files of all that a resume needs: masters, moments, EMA, RNG, step. No communication.

        The files hold the live tensors, so they must be written or copied before the next step.
        """
        return state_files(folder, self.settings.rank, self.step, self._adam.steps, self._pieces())

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load a state saved by any number of ranks at any ZeRO stage. Raises ValueError if it is not whole."""
        files = StateFiles(folder)
        keys = [key for key in self._adam.keys if key != TEACHER or self._has_teacher(files, TEACHER)]
        for name, param in self._trained():
            for key in keys:
                self._put(param, key, files.whole(f"{key}/{name}", numel(param)))
        if self._lora is not None and self._lora.keeps_teacher and self._has_teacher(files, CHANGE):
            self._lora.load(files)
        self.step = files.step
        self._adam.set_steps(files.adam_steps)
        torch.set_rng_state(files.rng(self.settings.rank))

    def _has_teacher(self, files: StateFiles, kind: str) -> bool:
        """Whether a state holds a teacher.

        A run without a teacher, or with the live student as teacher, saves none. Its teacher begins with the next
        stage: `base` is there already, the others are the student at that point. Raises ValueError if a teacher other
        than `base` is missing in the middle of a stage.
        """
        has = any(name.startswith(f"{kind}/") for name in files.names)
        ends = any(files.step == stage.before for stage in self.settings.stages[1:])
        if not has and self.settings.teacher.weights != "base" and not ends:
            raise ValueError(f"the state of step {files.step}, in the middle of a stage, holds no teacher")
        return has

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad)

    def _pieces(self) -> Iterator[Piece]:
        if self._lora is not None:
            yield from self._lora.pieces()
        if self._zero_stage == 0 and self.settings.rank > 0:
            return  # every rank holds the whole state, and rank 0 saves it
        for name, param in self._trained():
            for key in self._adam.keys:
                found = self._piece(param, key)
                if found is not None:
                    yield Piece(f"{key}/{name}", *found)

    def _piece(self, param: torch.nn.Parameter, key: str) -> tuple[int, torch.Tensor] | None:
        """Return the offset of this rank's part of a parameter's flat state, and the part, or None if it has none."""
        stage, state = self._zero_stage, None if key == MASTER else key
        if stage == 0:
            return 0, (param.detach() if state is None else self._adam.state[param][state]).view(-1)
        if stage == 3:
            part = safe_get_local_fp32_param(param) if state is None else safe_get_local_optimizer_state(param, state)
            start = part.numel() * self.settings.rank
            size = min(part.numel(), numel(param) - start)  # the last parts are padded
            return (start, part.view(-1)[:size]) if size > 0 else None
        return fragment(param, state)

    def _put(self, param: torch.nn.Parameter, key: str, whole: torch.Tensor) -> None:
        """Copy this rank's part of a parameter's state from `whole`, flat; for the master also set the weights."""
        place = self._piece(param, key)
        if place is not None:
            start, part = place
            part.copy_(whole[start : start + part.numel()])
        if key == MASTER:
            with deepspeed.zero.GatheredParameters([param], modifier_rank=0):  # no effect below ZeRO stage 3
                param.data.copy_(whole.view(param.shape))
