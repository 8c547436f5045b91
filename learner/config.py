"""Settings of the learner: loss, teacher weights, optimizer, DeepSpeed. Does not import torch, ray or vllm."""

import math
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdft.actors.config import NAME
from sdft.actors.shared.types import Support

MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 8192}
# Bytes of logits at once. On a CPU 1024 positions of a vocabulary of 49152 in bfloat16, or 512 in float32. On a GPU
# each chunk also reads and writes the head's gradient in float32, so they are larger.
CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 2 << 30}
# Bytes of float32 scratch per block: on a CPU it fits the cache, on a GPU kernel launches dominate.
FLOAT32_BYTES = {"cpu": 3 << 20, "cuda": 256 << 20}
OFFLOAD_CHUNK = 1 << 26  # numbers of the state at once on a GPU: 768 MiB of two moments and the teacher
WIDEST = 4096  # tokens of a support: a fused kernel of the loss holds all of a row's
ATTENTION_KEPT = 192  # tokens; a CPU keeps the attention weights of sequences up to this length for the gradient


class TeacherConfig(BaseModel):
    """The teacher's weights: `ema` follows the student slowly, `live` is the student.

    `frozen` is the student at the start of the stage, `gated` the same until a refresh, `base` the student at the start
    of the run, `external` another model with the same tokens, or several, of which each row of data names one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Literal["ema", "gated", "frozen", "base", "live", "external"] = Field(
        "ema",
        description="ema follows the student; gated: refreshed from the student while the retention guard finds "
        "nothing; frozen, base: the student at the start of the stage, of the run; live: the student itself; external: "
        "teacher.model or teacher.models",
    )
    refresh_every: int | None = Field(
        None, ge=1, description="With weights: gated, steps of a stage between two refreshes of the teacher"
    )
    model: str | None = Field(
        None, description="With weights: external, the teacher: a built-in name, a local folder or a hub id"
    )
    models: dict[str, str] = Field(
        {},
        description="With weights: external, several teachers by names of your own; the column teacher of a row names "
        "the one that teaches it",
    )
    alpha: float = Field(0.02, ge=0, le=1, description="teacher <- alpha * student + (1 - alpha) * teacher, every step")
    temperature: float = Field(
        1.0,
        gt=0,
        description="The teacher's logits are divided by it before they are scores; below 1 its distributions are "
        "sharper",
    )

    @model_validator(mode="after")
    def _external_has_a_model(self) -> "TeacherConfig":
        if self.weights == "external" and self.model is None and not self.models:
            raise ValueError("weights external needs the teacher; set teacher.model, or teacher.models for several")
        for key, given in (("model", self.model), ("models", self.models)):
            if self.weights != "external" and given:
                raise ValueError(
                    f"{key} has no effect with weights {self.weights}; set weights: external, or remove {key}"
                )
        return self

    @model_validator(mode="after")
    def _gated_has_a_pace(self) -> "TeacherConfig":
        if self.weights == "gated" and self.refresh_every is None:
            raise ValueError("weights gated needs the steps between two refreshes; set teacher.refresh_every")
        if self.weights != "gated" and self.refresh_every is not None:
            raise ValueError(
                f"refresh_every has no effect with weights {self.weights}; set weights: gated, or remove refresh_every"
            )
        if self.weights == "gated" and self.alpha != type(self).model_fields["alpha"].default:
            raise ValueError("alpha has no effect with weights gated, whose refresh is the whole student; remove alpha")
        return self

    @model_validator(mode="after")
    def _one_teacher_or_several(self) -> "TeacherConfig":
        if self.models and self.model is not None:
            raise ValueError("model is one teacher and models are several; remove one of the two")
        if len(self.models) == 1:
            (name,) = self.models
            raise ValueError(f"models has one teacher, {name}; set teacher.model to its model, or add another teacher")
        wrong = next((name for name in self.models if not re.fullmatch(NAME, name)), None)
        if wrong is not None:
            raise ValueError(f"models: {wrong} is not a name for a teacher; use lower-case letters, digits, - and _")
        return self

    @property
    def routes(self) -> tuple[str, ...]:
        """The names of the teachers; the only teacher is called ""."""
        return tuple(self.models) or ("",)

    @property
    def of_learner(self) -> "TeacherConfig":
        """What the learner keeps of the teacher: nothing of an external one, as of a live one."""
        return TeacherConfig(weights="live") if self.weights == "external" else self


class ImportanceConfig(BaseModel):
    """Truncated importance weights, learner over sampler: exp(logp_learner - logp_sampler), capped, no gradient."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    level: Literal["sequence", "token", "off"] = Field(
        "sequence", description="One weight per sequence (the mean of its tokens' weights), one per token, or none"
    )
    cap: float = Field(2.0, gt=0, description="Largest weight")


class _Divergence(BaseModel):
    """Base class. Without further settings it needs at most the teacher's log-prob of the sampled token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def scored(self) -> Support:
        """The tokens that the teacher scores at each position, besides the sampled one."""
        return Support("teacher", 1)


class _OfSupport(_Divergence):
    """A divergence over some tokens of each position, or over all."""

    support: Literal["teacher", "student", "union", "full"] = Field(
        "teacher",
        description="Tokens of a position: the teacher's top_k most likely, the student's, those of both, or all",
    )
    top_k: int | None = Field(
        default_factory=lambda data: None if data.get("support") == "full" else 64,
        ge=1,
        le=1024,
        description="Tokens per position; the rest is one tail bucket. auto, the default: 64; none with support full",
    )
    clip: float | None = Field(
        None,
        gt=0,
        description="Largest divergence of a token, in nats; a token beyond it has no gradient; null: no bound",
    )

    @model_validator(mode="after")
    def _k_has_an_effect(self) -> "_OfSupport":
        if self.support == "full" and self.top_k is not None:
            raise ValueError(f"top_k {self.top_k} has no effect with support full, which has all tokens; remove it")
        if self.support != "full" and self.top_k is None:
            raise ValueError(f"support {self.support} needs top_k; set it, or set support: full")
        return self

    @property
    def scored(self) -> Support:
        return Support(self.support, self.top_k or 0)


class Forward(_OfSupport):
    """KL(teacher, student). The published numbers use it, though the paper's theory is about reverse KL."""

    type: Literal["forward"] = Field("forward", description="The divergence")


class Reverse(_OfSupport):
    """KL(student, teacher)."""

    type: Literal["reverse"] = Field("reverse", description="The divergence")


class Jsd(_OfSupport):
    """The generalised Jensen-Shannon divergence."""

    type: Literal["jsd"] = Field("jsd", description="The divergence")
    beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in the mixture")

    @model_validator(mode="after")
    def _clip_is_reached(self) -> "Jsd":
        bound = -self.beta * math.log(self.beta) - (1 - self.beta) * math.log(1 - self.beta)
        if self.clip is not None and self.clip >= bound:
            raise ValueError(
                f"clip {self.clip:g} has no effect: with beta {self.beta:g} no token's divergence is more than "
                f"{bound:.3g}; lower clip, or remove it"
            )
        return self


class Sampled(_Divergence):
    """Reverse KL, estimated at the sampled token alone."""

    type: Literal["sampled"] = Field("sampled", description="The divergence")


class Nll(_Divergence):
    """Negative log-likelihood of the sequence's own tokens, without a teacher."""

    type: Literal["nll"] = "nll"


class Dft(_Divergence):
    """The same, each token weighted by the student's own probability of it."""

    type: Literal["dft"] = "dft"


Divergence = Forward | Reverse | Jsd | Sampled


class LossConfig(BaseModel):
    """A loss of the learner. Algorithms make it; it is not a section of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    divergence: Annotated[Divergence | Nll | Dft, Field(discriminator="type")] = Forward()
    importance: ImportanceConfig = ImportanceConfig()
    entropy: float = 0.0  # weight of the student's entropy, which is taken from a token's loss
    length: int | None = None  # tokens from which on a completion's weight falls; None: it does not

    @property
    def name(self) -> str:
        """Name of the divergence."""
        return self.divergence.type

    @property
    def clip(self) -> float | None:
        """Largest divergence of a token; None: no bound."""
        return self.divergence.clip if isinstance(self.divergence, _OfSupport) else None


class OptimizerConfig(BaseModel):
    """AdamW and its schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float = Field(1e-5, gt=0, description="Learning rate after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates of the two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's term in the denominator")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="Learning rate after the warm-up: a cosine to 0 over the stage, or constant"
    )
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up at the start of a stage")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient")


class LoraConfig(BaseModel):
    """Low-rank adapters on frozen weights: weight + alpha / rank * B A. Only A and B are trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, description="Rank of the adapters")
    alpha: float = Field(32, gt=0, description="The adapters' product is scaled by alpha / rank")
    targets: tuple[str, ...] = Field((), description="Linear layers by name, as q_proj; empty: all but the head")


class LearnerConfig(BaseModel):
    """The DeepSpeed learner."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ranks: int = Field(1, ge=1, description="Learner processes; each takes a share of every batch")
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Ranks that divide the tokens of a micro-batch, for sequences that are too long for one; attention "
        "divides its heads (Ulysses)",
    )
    zero_stage: Literal[0, 1, 2, 3] | None = Field(None, description="null: 0 for one rank in float32, else 1")
    zero_group: int | None = Field(
        None,
        gt=1,
        description="Ranks of a node at zero_stage 3, among which a second copy of the weights is divided, so that the "
        "backward pass gathers them within the node (hpZ); null: all ranks divide them once",
    )
    cpus: float = Field(0.5, gt=0, description="Ray CPUs reserved by each rank")
    gpus: float = Field(1, ge=0, description="GPUs of each rank, or a part of one; used with device: cuda only")
    labels: dict[str, str] = Field(
        {}, description="Only on nodes of a running cluster that have these labels (ray start --labels)"
    )
    threads: int | None = Field(None, ge=1, description="Threads of each rank; null: the node's cores / ranks")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens packed into one forward; null: 4096 on a CPU, 8192 on a GPU"
    )
    train_router: bool = Field(
        False, description="Train the routers of a mixture of experts too; otherwise they stay as they are"
    )
    replay_experts: bool | None = Field(
        None,
        description=(
            "Route tokens to the experts that the sampler chose. null: of a mixture of experts in bfloat16 on a CPU, "
            "unless student engines are split"
        ),
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Compute activations again in the backward pass: less memory, more time; null: on a GPU of known "
        "memory if the plan does not fit without, else false",
    )
    offload: bool = Field(
        False,
        description="Keep AdamW's moments and the teacher's average in the host's memory, with the same results; on "
        "GPUs only. It saves 12 bytes of a GPU for each trained weight, and copies as many both ways in each step",
    )
    deterministic: bool = Field(
        True,
        description="Use kernels that give the same bits in every run, as a strict run promises; on GPUs false may "
        "save time",
    )
    overlap: bool = Field(
        False,
        description="Add gradients up over the ranks beside the backward pass; on GPUs, with zero_stage 2 or 3",
    )
    lora: LoraConfig | None = Field(None, description="null: every weight is trained")
    optimizer: OptimizerConfig = OptimizerConfig()
    start_timeout_s: float = Field(600, gt=0, description="How long the learner may take to start")
    step_timeout_s: float = Field(
        3600, gt=0, description="How long a call to the learner may take: a step, a snapshot, a save"
    )
    health_timeout_s: float = Field(120, gt=0, description="A rank that answers nothing for so long is lost")
    max_restarts: int = Field(3, ge=0, description="Losses of the learner within an hour before the run gives up")

    @model_validator(mode="after")
    def _ranks_divide(self) -> "LearnerConfig":
        if self.ranks % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel} must divide ranks {self.ranks}, because so many ranks "
                f"compute each micro-batch; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _groups_divide(self) -> "LearnerConfig":
        if self.zero_group is None:
            return self
        if self.zero_stage != 3:
            raise ValueError("zero_group divides the weights, as zero_stage 3 does; set that, or remove zero_group")
        if self.ranks % self.zero_group or self.zero_group == self.ranks:
            raise ValueError(
                f"zero_group {self.zero_group} must divide ranks {self.ranks} into several groups; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _overlap_is_possible(self) -> "LearnerConfig":
        if self.overlap and (self.ranks == 1 or self.zero_stage not in (2, 3)):
            raise ValueError(
                "overlap needs several ranks and zero_stage 2 or 3, at which gradients are added up piece by piece; "
                "set them, or remove overlap"
            )
        return self

    def tokens_at_once(self, device: str) -> int:
        """Return the tokens of one forward that a rank computes.

        On a GPU more, because launching the kernels of a smaller forward takes longer than the kernels.
        """
        return self.micro_batch_tokens or MICRO_BATCH_TOKENS[device]

    def zero_stage_for(self, dtype: str) -> int:
        """Return the ZeRO stage for weights in this dtype.

        The default is 0 for one rank in float32. There is nothing to divide and the weights are their own masters, so
        the other ZeRO stages would only copy every gradient twice (a fifth of a small step).
        """
        if self.zero_stage is not None:
            return self.zero_stage
        return 0 if self.ranks == 1 and dtype == "float32" else 1
