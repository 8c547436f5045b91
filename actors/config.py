"""Settings of the vLLM engines. Imports neither torch, ray nor vllm, so a config can be checked in milliseconds."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EngineConfig(BaseModel):
    """Number and resources of the engines of one role."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(1, ge=1, description="Number of engines of this role; with max_replicas the least")
    max_replicas: int | None = Field(
        None, ge=1, description="The pool grows to as many while the learner waits for it; null: it does not grow"
    )
    # Half a Ray CPU: in strict mode the roles take turns, so three of them fit a two-core laptop.
    cpus: float = Field(0.5, gt=0, description="Ray CPUs reserved by each engine")
    gpus: float = Field(1, ge=0, description="GPUs of each engine, or a part of one; used with device: cuda only")
    labels: dict[str, str] = Field(
        {}, description="Only on nodes of a running cluster that have these labels (ray start --labels)"
    )
    threads: int | None = Field(None, ge=1, description="OpenMP threads of a CPU engine; null: every core of the node")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="GiB of KV cache; null: 1 on a CPU, on a GPU what gpu_memory_utilization leaves for it"
    )
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1, description="Share of a GPU's memory an engine may use")
    max_num_seqs: int = Field(64, ge=1, description="Sequences decoded at once")
    enforce_eager: bool = Field(
        True, description="false compiles the model: rollouts on a CPU take a tenth less, the start 45 s more"
    )
    start_timeout_s: float = Field(600, gt=0, description="How long an engine may take to start")
    health_timeout_s: float = Field(120, gt=0, description="An engine that answers nothing for so long is replaced")
    max_restarts: int = Field(3, ge=0, description="Losses of an engine within an hour before the run gives up")
    drain_timeout_s: float = Field(
        120, gt=0, description="How long an engine that leaves may finish its work before others do it again"
    )

    @model_validator(mode="after")
    def _sizes(self) -> "EngineConfig":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than replicas {self.replicas}, which is the pool's least; "
                f"raise it, or leave it out for a pool of one size"
            )
        return self

    @property
    def cpu_cache_gib(self) -> float:
        """GiB of KV cache of a CPU engine."""
        return self.kv_cache_gib or 1

    @property
    def most(self) -> int:
        """Upper bound on the number of engines in the pool."""
        return self.max_replicas or self.replicas


class ActorsConfig(BaseModel):
    """The two pools. With live teacher weights the student engines score too and `teacher` is not started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: EngineConfig = EngineConfig()
    teacher: EngineConfig = EngineConfig()
    batch_timeout_s: float = Field(
        1800,
        gt=0,
        description="How long the engines may take for a batch: a step's rollouts, its scores, or an evaluation set",
    )

    def of(self, role: str) -> EngineConfig:
        """The pool of a role, "student" or "teacher"; KeyError for any other."""
        return {"student": self.student, "teacher": self.teacher}[role]


class SamplingConfig(BaseModel):
    """How the student samples (sampling temperature 1 and top-p 1 are the published setting)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(256, ge=1, description="Longest completion in tokens")
    temperature: float = Field(
        1.0,
        gt=0,
        description="Training is at 1: importance weights correct for another up to a cap; mismatch_kl includes it",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="The same; tokens that it leaves out are never trained on")
    generations: int = Field(1, ge=1, description="Rollouts per prompt; more than one gave negligible gain")


Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class EngineSettings:
    """Settings that one engine is started with."""

    model: str  # local folder
    dtype: str
    device: str  # "cpu" or "cuda"
    max_model_len: int
    max_logprobs: int
    max_num_seqs: int
    hold_batches: bool  # until they are complete, and one batch at a time; otherwise requests start as they arrive
    share_prompts: bool  # compute a prompt once for all sequences that begin with it
    gpu_memory_utilization: float
    enforce_eager: bool
    max_probe_gap: float
    threads: int | None  # OpenMP threads on the CPU; None: every core
    kv_cache_gib: float | None  # None, on GPUs: what gpu_memory_utilization leaves for it
    exclusive: bool = False  # no other process of the run computes while this engine does
    stop_ids: tuple[int, ...] = ()  # tokens that end a reply, besides those in the model folder
    transport: str = "memory"  # weights.transport
    extension: str = "sdft.actors.vllm.extension.WorkerExtension"  # loaded in the engine's worker processes
